"""The scripts that run on hosts, here in a folder: what they do to things of others."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import pwd
import signal
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from callready.release.bundle import APPLY, CERTIFICATES, UNITS

ME = pwd.getpwuid(os.geteuid()).pw_name


class Machine:
    """A folder that the scripts take for the whole machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.here = root, root / "here"
        self.environment = {**os.environ, "CALLREADY_ROOT": str(root)}
        for folder in ("etc/callready/releases", "var/lib/callready", "opt", "run"):
            (root / folder).mkdir(parents=True)

    def bring(self) -> None:
        """The scripts, which remove themselves when they have run."""
        self.here.mkdir(exist_ok=True)
        for name, content in (APPLY | UNITS | CERTIFICATES).items():
            (self.here / name).write_bytes(content)

    def start(self, script: str) -> subprocess.Popen[str]:
        """Functions of release.sh."""
        self.bring()
        return subprocess.Popen(
            ["sh", "-c", f". {self.here}/release\n{script}"],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, script: str) -> str:
        """What they say; they must succeed."""
        process = self.start(script)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def apply(self, *steps: str) -> str:
        """Steps, as a deploy runs them."""
        self.bring()
        (self.here / "steps").write_text("\n".join(steps))
        done = subprocess.run(
            ["sh", self.here / "apply.sh", self.here],
            env=self.environment,
            text=True,
            capture_output=True,
            check=False,
        )
        return done.stdout + done.stderr

    def release(
        self,
        name: str,
        *manifest: str,
        files: dict[str, str] | None = None,
        confirmed: bool = True,
    ) -> None:
        """A release that the host has, and has confirmed."""
        folder = self.root / "etc/callready/releases" / name
        folder.mkdir()
        (folder / "manifest").write_text("".join(f"{line}\n" for line in manifest))
        for path, text in (files or {}).items():
            (folder / f"files{path}").parent.mkdir(parents=True, exist_ok=True)
            (folder / f"files{path}").write_text(text)
        for link in ("current", "confirmed")[: 1 + confirmed]:
            (self.root / "etc/callready" / link).unlink(missing_ok=True)
            (self.root / "etc/callready" / link).symlink_to(f"releases/{name}")
        with (self.root / "var/lib/callready/history").open("a") as history:
            history.write(f"now\t{name}\troot\tdeploy\trun-{name}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("target", ["secret", "folder"])
def test_a_link_in_place_of_an_environment_file_is_not_followed(
    machine: Machine, target: str
) -> None:
    """Its folder is the application's: the link may lead to what only root can read."""
    app = machine.root / "app"
    (app / "folder").mkdir(parents=True)
    (app / "secret").write_text("root:only\n")
    (app / ".env").symlink_to(app / target)
    (app / ".env.callready-new").symlink_to(app / "folder")
    (app / "lines").write_text("KEY=new\n")
    machine.run(f"put_environment {app}/.env {ME} {app}/lines /dev/null")
    assert (app / ".env").read_text() == "KEY=new\n" and not (app / ".env").is_symlink()
    assert (app / "secret").read_text() == "root:only\n"
    assert not list((app / "folder").iterdir())


@pytest.mark.parametrize("before", ["A=1\nKEY=old\n", None])
@pytest.mark.parametrize("put", [0, 1, 2])
def test_an_environment_file_is_given_back_wherever_a_deploy_was_cut(
    machine: Machine, before: str | None, put: int
) -> None:
    path, folder = machine.root / "app.env", machine.root / "etc/callready/releases/one"
    if before:
        path.write_text(before)
    (folder / f"environment{path}").parent.mkdir(parents=True)
    (folder / f"environment{path}").write_text("KEY=new\n")
    (folder / "manifest").write_text(f"environment\t{path}\t{ME}\thash\t-\n")
    machine.run("keep_environments one")
    for _ in range(put):
        machine.run(f"put_environment {path} {ME} {folder}/environment{path} /dev/null")
        assert path.read_text() == "A=1\nKEY=new\n" if before else "KEY=new\n"
        machine.run("ln -sfn releases/one $ROOT/confirmed; keep_environments one")
    machine.run("put_environments none one")
    assert (path.read_text() if path.exists() else None) == before


def test_a_removal_that_was_taken_back_can_be_done_again(machine: Machine) -> None:
    env, live = machine.root / "app.env", machine.root / "etc/live.conf"
    env.write_text("KEY=old\n")
    live.write_text("by hand\n")
    folder = machine.root / "etc/callready/releases/one"
    (folder / f"environment{env}").parent.mkdir(parents=True)
    (folder / f"environment{env}").write_text("KEY=new\n")
    (folder / "manifest").write_text(f"file\t{live}\nenvironment\t{env}\t{ME}\thash\t-\n")
    put = f"put_environment {env} {ME} {folder}/environment{env} /dev/null"
    machine.run(
        f"keep_environments one; place_links one; {put}; ln -sfn releases/one $ROOT/confirmed"
    )
    for _ in range(2):
        machine.run(f"withdraw {live}; put_environments none one")
        assert (live.read_text(), env.read_text()) == ("by hand\n", "KEY=old\n")
        machine.run("place_links one; put_environments one none; drop_copies one")
        assert live.is_symlink() and env.read_text() == "KEY=new\n"
    machine.run(f"withdraw {live}; put_environments none one; rm $ROOT/confirmed; drop_copies none")
    assert (live.read_text(), env.read_text()) == ("by hand\n", "KEY=old\n")
    # What the operator writes then is what was there before the next time.
    live.write_text("by hand again\n")
    machine.run(f"place_links one; withdraw {live}")
    assert live.read_text() == "by hand again\n"


def test_only_what_callready_installed_is_tidied_away(machine: Machine) -> None:
    """LiveKit's own installer puts its Docker files into /opt/livekit."""
    opt, state = machine.root / "opt/livekit", machine.root / "var/lib/callready"
    unit = f"{machine.root}/etc/systemd/system/livekit-server.service"
    for folder in ("1.0.0", "1.1.0", "caddy_data"):
        (opt / folder).mkdir(parents=True)
    (opt / "docker-compose.yaml").touch()
    (state / "binaries").write_text(f"{opt}/1.0.0\n{opt}/1.1.0\n")
    machine.release("new", files={unit: f"ExecStart={opt}/1.1.0/livekit-server --config x\n"})
    machine.run("tidy")
    assert sorted(os.listdir(opt)) == ["1.1.0", "caddy_data", "docker-compose.yaml"]


def test_secrets_of_a_pool_go_with_the_last_release_that_has_it(machine: Machine) -> None:
    state, tls = machine.root / "var/lib/callready", machine.root / "etc/callready/tls"
    turn = machine.root / "var/lib/turn"
    turn.mkdir()
    databases = [turn / name for name in ("calls.db", "old.db")]
    (state / "databases").write_text("".join(f"{path}\n" for path in databases))
    for path in databases:
        path.touch()
    for name in ("a.test", "old.test"):
        (tls / name).mkdir(parents=True)
    machine.release(
        "first",
        *(f"database\t{d}" for d in databases),
        "certificate\ta.test",
        "certificate\told.test",
    )
    for number in range(5):
        assert databases[1].exists() and (tls / "old.test").exists()
        machine.release(f"later{number}", f"database\t{databases[0]}", "certificate\ta.test")
        machine.run("tidy")
    assert [path.exists() for path in databases] == [True, False]
    assert os.listdir(tls) == ["a.test"]


def test_what_somebody_made_of_a_managed_file_is_not_what_was_there_before(
    machine: Machine,
) -> None:
    path = machine.root / "etc/live.conf"
    machine.release("one", f"file\t{path}", files={str(path): "ours\n"})
    machine.run("place_links one")
    assert path.is_symlink()
    path.unlink()  # as `sed -i` does
    path.write_text("edited\n")
    machine.run(f"place_links one && withdraw {path}")
    assert not path.exists()


def test_what_was_there_before_comes_back(machine: Machine) -> None:
    path = machine.root / "etc/live.conf"
    machine.release("zero")
    path.write_text("by hand\n")
    folder = machine.root / "etc/callready/releases/one"
    (folder / "files").mkdir(parents=True)
    (folder / "manifest").write_text(f"file\t{path}\n")
    machine.run(f"place_links one; readlink {path}")
    assert path.is_symlink()
    machine.run(f"withdraw {path}")
    assert path.read_text() == "by hand\n"


BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
# What a host would be asked to do; this machine is not.
NOTHING = "systemctl() { :; }; nft() { false; }"


@pytest.mark.parametrize(
    ("boot", "is_deaf", "ended_by"),
    [
        (f"@{BOOT}", False, signal.SIGTERM),
        (f"@{BOOT}", True, signal.SIGKILL),
        ("@another-boot", False, None),
        ("", False, None),
    ],
    ids=["this boot", "deaf to SIGTERM", "an earlier boot", "an older callready"],
)
def test_only_the_deploy_that_waits_is_ended_and_the_host_returns_anyway(
    machine: Machine, boot: str, is_deaf: bool, ended_by: signal.Signals | None
) -> None:
    machine.release("good")
    machine.release("bad", confirmed=False)
    pending = machine.root / "var/lib/callready/pending"
    stuck = subprocess.Popen(
        ["sleep", "60"],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, [signal.SIG_DFL, signal.SIG_IGN][is_deaf]),
    )
    pending.write_text(f"bad {stuck.pid}{boot} me since now\n")
    with (machine.root / "run/callready.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        revert = machine.start(f"{NOTHING}; revert")
        # It has done what it does to the other process when it waits for the lock.
        while not is_waited_for(lock.fileno()):
            assert revert.poll() is None, revert.communicate()
        if ended_by:
            assert stuck.wait(timeout=10) == -ended_by
    said, _ = revert.communicate()
    assert said == "returned to release good\n"
    assert os.readlink(machine.root / "etc/callready/current") == "releases/good"
    assert not pending.exists()
    if not ended_by:
        assert stuck.poll() is None
        stuck.kill()
        stuck.wait()


def test_a_deploy_that_is_ended_says_why_and_what_the_host_has(machine: Machine) -> None:
    machine.release("good")
    assert machine.apply(NOTHING, "armed=yes", "kill -TERM $$", "echo went on").splitlines() == [
        "this host has returned to release good",
        "callready: stopped: this host has waited for its confirmation as long as "
        "deploy.confirm_timeout says",
    ]


def is_waited_for(descriptor: int) -> bool:
    """Whether somebody waits for a lock on a file (proc(5), /proc/locks)."""
    inode = f":{os.fstat(descriptor).st_ino}"
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(line[1] == "->" and line[6].endswith(inode) for line in lines)


@pytest.mark.parametrize(
    "line", ["", ".", "keep", "{opt}", "{opt}/", "{opt}/../../keep", "{root}/keep"]
)
@pytest.mark.parametrize("how", ["tidy", "uninstall"])
def test_a_list_of_what_is_ours_does_not_lead_out_of_its_folder(
    machine: Machine, line: str, how: str
) -> None:
    opt, state, keep = (
        machine.root / path for path in ("opt/livekit", "var/lib/callready", "keep")
    )
    for folder in (opt / "1.0.0", opt / "theirs", keep):
        folder.mkdir(parents=True)
    line = line.format(opt=opt, root=machine.root)
    (state / "binaries").write_text(f"{opt}/1.0.0\n{line}\n")
    if how == "tidy":
        (state / "databases").write_text(f"{line}\n")
        machine.release("new")
        said = machine.run("tidy")
    else:
        said = machine.apply(NOTHING, "uninstall")
        assert "nothing of callready is left on this host" in said
        assert not state.exists()
    assert f"'{line}' stays: it is not in {opt}, where callready put it" in said or not line
    assert keep.exists() and os.listdir(opt) == ["theirs"]


@pytest.mark.parametrize("name", ["root", "0", "-r root", "", "no-such-user"])
def test_only_users_that_callready_created_are_removed(machine: Machine, name: str) -> None:
    (machine.root / "var/lib/callready/users").write_text(f"{name}\n")
    said = machine.apply(NOTHING, 'userdel() { echo "userdel $*"; }', "uninstall")
    assert "userdel" not in said
    assert (f"user '{name}' stays" in said) == (name in ("root", "0"))


ARCHIVE = "livekit_1.0.0_linux_amd64.tar.gz"


@pytest.fixture
def downloads() -> Iterator[tuple[str, bytes]]:
    """A server that sends on to where its files lie, as GitHub does."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("livekit-server")
        body = b"#!/bin/sh\necho 1.0.0\n"
        member.size, member.mode = len(body), 0o755
        tar.addfile(member, io.BytesIO(body))
    packed = buffer.getvalue()
    files = {
        f"/v1.0.0/{ARCHIVE}": packed,
        "/v1.0.0/checksums.txt": f"{hashlib.sha256(packed).hexdigest()}  {ARCHIVE}\n".encode(),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            moved = not self.path.startswith("/files")
            body = b"" if moved else files[self.path.removeprefix("/files")]
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", f"/files{self.path}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", packed
    server.shutdown()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_download_that_is_sent_on_is_followed(
    machine: Machine, downloads: tuple[str, bytes], pinned: bool
) -> None:
    url, packed = downloads
    pin = hashlib.sha256(packed).hexdigest() if pinned else "''"
    said = machine.apply(f"install_livekit {url} 1.0.0 {ARCHIVE} {pin}")
    assert said == "downloading livekit-server 1.0.0\n"
    assert (machine.root / "opt/livekit/1.0.0/livekit-server").exists()


def test_a_folder_of_somebody_else_is_not_replaced(
    machine: Machine, downloads: tuple[str, bytes]
) -> None:
    mine = machine.root / "opt/livekit/1.0.0/notes"
    mine.parent.mkdir(parents=True)
    mine.touch()
    said = machine.apply(f"install_livekit {downloads[0]} 1.0.0 {ARCHIVE}")
    assert "is not callready's and has no livekit-server: move it out of the way" in said
    assert mine.exists()


def an_app(machine: Machine, name: str, value: str, confirmed: bool = True) -> Path:
    """A release that has a key in the app's environment file."""
    path = machine.root / "app/.env"
    path.parent.mkdir(exist_ok=True)
    machine.release(name, f"environment\t{path}\t{ME}\thash\t-", confirmed=confirmed)
    lines = machine.root / f"etc/callready/releases/{name}/environment{path}"
    lines.parent.mkdir(parents=True)
    lines.write_text(f"KEY={value}\n")
    return path


SAID = 'systemctl() { echo "systemctl $*"; }; nft() { false; }; id() { echo 0; }'


def waiting(machine: Machine, release: str) -> None:
    (machine.root / "var/lib/callready/pending").write_text(
        f"{release} 1@another-boot me since now\n"
    )


def test_a_file_that_was_never_written_keeps_nothing_from_being_returned_to(
    machine: Machine,
) -> None:
    path = an_app(machine, "good", "good")
    an_app(machine, "bad", "bad", confirmed=False)
    path.mkdir()
    (path / "theirs").touch()
    waiting(machine, "bad")
    said = machine.run(f"{SAID}; revert")
    assert f"callready: {path} is a folder\n" in said
    assert f"callready: {path} stays as it is: release bad has not written it\n" in said
    assert "systemctl stop callready-firewall.service" in said  # its services
    assert said.endswith("returned to release good\n")
    assert not (machine.root / "var/lib/callready/pending").exists()
    assert os.listdir(path) == ["theirs"]
    assert not list((machine.root / "etc/callready").glob("before/**/theirs"))
    assert not list(machine.root.rglob("*callready-new*"))


def test_services_are_returned_to_once_while_a_written_file_cannot_be(machine: Machine) -> None:
    path = an_app(machine, "good", "good")
    an_app(machine, "bad", "bad", confirmed=False)
    path.write_text("A=1\nKEY=bad\n")
    (obstacle := path.with_name(".env.callready-new")).mkdir()
    waiting(machine, "bad")
    revert = f"{SAID}; (revert) || echo failed"
    said = machine.run(revert)
    assert "is a folder" in said and "stop callready-firewall" in said
    assert said.endswith(
        "callready: release good is back, but not in every environment file; trying again\nfailed\n"
    )
    assert "stop callready-firewall" not in machine.run(revert)
    assert path.read_text() == "A=1\nKEY=bad\n"
    obstacle.rmdir()
    assert machine.run(revert).endswith("returned to release good\n")
    assert path.read_text() == "A=1\nKEY=good\n"
    assert not list((machine.root / "run").glob("callready.[!l]*"))


def test_a_live_path_that_somebody_made_a_folder_of_keeps_nothing_from_being_returned_to(
    machine: Machine,
) -> None:
    live, other = machine.root / "etc/live.conf", machine.root / "etc/other.conf"
    manifest = f"file\t{live}", f"file\t{other}"
    machine.release("good", *manifest, files={str(live): "ours", str(other): "ours"})
    machine.release("bad", *manifest, files={str(live): "new", str(other): "new"}, confirmed=False)
    live.mkdir()
    waiting(machine, "bad")
    said = machine.run(f"{SAID}; revert")
    assert f"callready: {live} is a folder\n" in said
    assert said.endswith("returned to release good\n")
    assert other.read_text() == "ours" and live.is_dir()
    assert not (machine.root / "etc/callready/before").exists()


def test_nothing_is_switched_where_something_stands_in_the_way(machine: Machine) -> None:
    path = an_app(machine, "one", "value", confirmed=False)
    path.mkdir()
    (machine.root / "etc/callready/current").unlink()
    said = machine.apply(NOTHING, "arm 5 one", "echo switched")
    assert f"callready: {path} is a folder\n" in said and "switched\n" not in said.replace(
        "was ", ""
    )
    assert not (machine.root / "var/lib/callready/pending").exists()
    machine.run("keep_environments one")
    assert not (machine.root / "etc/callready/before").exists()


CERTBOT = 'certbot() { echo "certbot $*"; }; command() { :; }'


@pytest.mark.parametrize(
    ("there", "asked", "noted", "asks", "deletes"),
    [
        (False, False, "", "a.test", "a.test"),
        (True, False, "", "a.test-callready", "a.test-callready"),
        (True, True, "", "a.test", "a.test"),  # by an older callready
        (True, False, "a.test", "a.test", "a.test"),  # cut after it was made
        (True, True, "a.test-callready", "a.test-callready", "a.test-callready"),
    ],
)
def test_a_certificate_that_the_operator_asked_for_stays_as_it_is(
    machine: Machine, there: bool, asked: bool, noted: str, asks: str, deletes: str
) -> None:
    tls, renewal = (
        machine.root / path for path in ("etc/callready/tls/a.test", "etc/letsencrypt/renewal")
    )
    tls.mkdir(parents=True)
    renewal.mkdir(parents=True)
    if there:
        (renewal / "a.test.conf").touch()
    if asked:
        (tls / "asked").write_text("request\n")
    if noted:
        (machine.root / "var/lib/callready/lineages").mkdir()
        (machine.root / "var/lib/callready/lineages/a.test").write_text(f"{noted}\n")
    said = machine.apply(
        NOTHING,
        'certbot() { echo "$*" > $ROOT/args; }',
        "request_certificate a.test request --cert-name a.test -d a.test",
        "cat $ROOT/args",
    )
    assert said.splitlines()[-1].endswith(f"--cert-name {asks}"), said
    assert ("was there before callready and stays" in said) == (asks != "a.test" and not noted)
    (renewal / f"{asks}.conf").touch()
    assert (
        machine.run(f"{CERTBOT}; unask a.test") == f"certbot -q delete -n --cert-name {deletes}\n"
    )
    assert not (tls / "asked").exists()
    assert machine.run(f"{CERTBOT}; unask a.test") == ""


@pytest.mark.parametrize("is_theirs", [False, True])
def test_a_unit_that_the_operator_masked_stays_masked(machine: Machine, is_theirs: bool) -> None:
    unit = machine.root / "etc/systemd/system/coturn.service"
    unit.parent.mkdir(parents=True)
    if is_theirs:
        unit.symlink_to("/dev/null")
    other = unit.with_name("callready-of-mine.service")
    other.touch()
    machine.apply(NOTHING, "mask coturn.service")
    assert unit.is_symlink()
    machine.apply(NOTHING, "uninstall coturn.service")
    assert unit.is_symlink() == is_theirs and other.exists()


def test_numbers_that_were_reserved_are_given_back_and_no_others(machine: Machine) -> None:
    others = "debian:100000:65536\nsecond:165536:65536\n"
    files = [machine.root / "etc" / name for name in ("subuid", "subgid")]
    for file in files:
        file.write_text(others)
    line = "egress-ctr:200000:65536"
    for _ in range(2):
        assert machine.apply(f"reserve_ids {line}") == f"reserving users and groups: {line}\n"
        assert [file.read_text() for file in files] == [f"{others}{line}\n"] * 2
    machine.apply("uninstall")
    assert [file.read_text() for file in files] == [others] * 2
