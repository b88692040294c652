"""An S3 on the bridge: moto, which checks signatures and keeps everything in memory.

What it is made of is pinned in moto.txt, by `uv pip compile --universal --generate-hashes
--no-annotate --no-header` of moto[s3], flask and flask-cors.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lab import plan
from lab.run import Group, LabError, remove_tree, run, say, wait_until

PORT = 9000
ENDPOINT = f"http://{plan.MACHINE.ipv4}:{PORT}"
NAME = "recordings"
PACKAGES = Path(__file__).with_name("moto.txt")
FOLDER = plan.CACHE / "moto"
# The first four calls make a user with a key and need none; from then on moto refuses whoever has
# no key, or signs with a wrong one.
OPEN_CALLS = 4
CREATE = """
import boto3, json, sys
endpoint, name = sys.argv[1:]
at = {"endpoint_url": endpoint, "region_name": "us-east-1"}
nobody = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nobody"}
iam = boto3.client("iam", **at, **nobody)
iam.create_user(UserName="egress")
statement = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
iam.put_user_policy(UserName="egress", PolicyName="all", PolicyDocument=policy)
key = iam.create_access_key(UserName="egress")["AccessKey"]
iam.list_users()
own = {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
boto3.client("s3", **at, **own).create_bucket(Bucket=name)
print(json.dumps([key["AccessKeyId"], key["SecretAccessKey"]]))
"""
READ = """
import boto3, json, sys
endpoint, name, key, secret = json.load(sys.stdin)
client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1",
                      aws_access_key_id=key, aws_secret_access_key=secret)
found = client.list_objects_v2(Bucket=name).get("Contents", [])
print(json.dumps({each["Key"]: each["Size"] for each in found}))
"""


@dataclass(frozen=True)
class Bucket:
    """An empty bucket, and the only key that opens it."""

    access_key: str
    secret: str

    def objects(self) -> dict[str, int]:
        """What is in it: names and sizes in bytes."""
        asked = json.dumps([ENDPOINT, NAME, self.access_key, self.secret])
        return dict(json.loads(run(_python(), "-c", READ, input=asked)))


def start() -> Bucket:
    """Start a new S3 with an empty bucket; whatever an older one had is lost."""
    python = _python()
    stop()
    group = Group("service-s3")
    calls = f"INITIAL_NO_AUTH_ACTION_COUNT={OPEN_CALLS}"
    server = (python, "-m", "moto.server", "-H", plan.MACHINE.ipv4, "-p", str(PORT))
    group.start("env", calls, *server)
    log = plan.LOGS / f"{group.name}.log"

    def answers() -> bool:
        if not group.running():
            raise LabError(f"the S3 does not start; see {log}")
        return "Running on" in log.read_text()

    wait_until(answers, 30, f"the S3 does not answer on port {PORT}; see {log}")
    access_key, secret = json.loads(run(python, "-c", CREATE, ENDPOINT, NAME))
    return Bucket(access_key, secret)


def stop() -> None:
    """End the S3."""
    Group("service-s3").kill()
    (plan.LOGS / "service-s3.log").unlink(missing_ok=True)


def _python() -> Path:
    """The Python that has moto, made unless it is there."""
    done = FOLDER / PACKAGES.name
    if not done.exists() or done.read_bytes() != PACKAGES.read_bytes():
        say("installing moto, once")
        folder = plan.CACHE / f"build-moto-{os.getpid()}"
        run(sys.executable, "-m", "venv", folder)
        install = ("-m", "pip", "install", "-q", "--require-hashes", "-r", PACKAGES)
        run(folder / "bin/python", *install)
        (folder / PACKAGES.name).write_bytes(PACKAGES.read_bytes())
        remove_tree(FOLDER)
        folder.rename(FOLDER)
    return FOLDER / "bin/python"
