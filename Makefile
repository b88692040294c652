# callready. `make demo` shows it on lab hosts, `make test` proves it; both install what they need.

SHELL := /bin/bash -o pipefail
ENV ?= prod
PYTHON := .venv/bin/python
PYINFRA := .venv/bin/pyinfra
INVENTORY := inventories/$(ENV)
# Of make secrets: age and SSH public keys.
export RECIPIENTS
# Every shell script, by its name or by its first line.
SCRIPTS = $(shell .venv/bin/shfmt -f $$(git ls-files))
# The lab's callers live in a network namespace of their own (facts a real caller has, too).
CALLER = $(if $(filter lab lab-watching lab-recording cluster,$(ENV)),$(PYTHON) -m lab client --,)

LAB_PACKAGES := aapt android-framework-res apt-cacher-ng conntrack docker-registry faketime iproute2 mmdebstrap nftables \
	openssh-client openssl prometheus sqlite3 strace systemd-container testssl.sh
ifeq ($(shell command -v go),)
LAB_PACKAGES += golang-go
endif

SABOTAGE_PACKAGES := chromium coturn libnss3-tools
ifeq ($(shell command -v npm),)
SABOTAGE_PACKAGES += npm
endif

.PHONY: help demo demo-watching demo-recording demo-cluster test test-long check lint unit tool-tests lab-tests fault-tests faults sabotage rollback remove history logs verify secrets trust rotate alert-test export capacity load lab-up lab-down bench bench-verification docs install lab-install

help:
	@echo "make demo                boot four lab hosts, deploy them, prove that calls connect"
	@echo "make demo-watching       the same with a fifth host that watches them"
	@echo "make demo-recording      the same with hosts that record calls"
	@echo "make demo-cluster        three SFUs as one service, their Redis, and two TURN hosts of one pool"
	@echo "make test                everything: lint, types, unit, lab, faults; ends with lab-down"
	@echo "make test-long           every alert by its fault in the lab, faults of a cluster; docs/watching.md; ends with lab-down"
	@echo "make check               the fast part, which needs neither root nor packages: lint, types, unit"
	@echo "make secrets ENV=prod    generate the secrets inventories/prod refers to"
	@echo "make trust   ENV=prod    show the hosts' SSH keys and record them"
	@echo "make rotate  ENV=prod WHAT=turn|livekit|redis|fleet-ca    the next phase of a rotation"
	@echo "make rollback ENV=prod [HOST=…]    return to the release before, as safely as a deploy"
	@echo "make history ENV=prod    who deployed what when"
	@echo "make logs    ENV=prod [HOST=…] [UNIT=…] [SINCE=2026-01-31T12] [MATCH=…]    what the hosts have logged"
	@echo "make remove  ENV=prod HOST=…    leave nothing of callready on a host"
	@echo "make verify  ENV=prod    verify a deployed inventory from where you are"
	@echo "make alert-test ENV=prod    send a test alert to everyone who is told, and say who took it"
	@echo "make export  ENV=prod [FOLDER=…]    what a Prometheus and a Grafana of your own need"
	@echo "make capacity ENV=prod [KIND=audio|video|gallery] [ROOM=4] [SPEAKERS=…] [RELAYED=0.2]    what each host can carry"
	@echo "make load    ENV=lab  [KIND=…] [ROOMS=8] [ROOM=4] [SPEAKERS=…] [RELAYED=0.2] [BY=udp,tcp,tls] [STEPS=4] [HOLD=20]    load it to its first limit"
	@echo "make bench [AGAINST=REV] measure against plain pyinfra, Ansible, bare ssh, and another commit"
	@echo "make bench-verification  how long a verification takes; leaves the lab deployed"
	@echo "make faults              every cut at every step of a deploy, every fault; docs/faults.md; ends with lab-down"
	@echo "make sabotage            break a deployed service in every way we know; docs/sabotage.md; ends with lab-down"
	@echo "make docs                write the generated pages of docs/"
	@echo "make lab-up, lab-down    the lab alone; lab-down removes every trace but the cache"

install: .venv/installed

.venv/installed: requirements.txt
	@echo "--> Python environment"
	@python3 -c 'import venv, ensurepip' 2>/dev/null || (apt-get -qq update && apt-get -qq -y install python3-venv)
	@python3 -m venv .venv
	@# pip alone takes a minute where uv takes seconds; both check every hash.
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.txt > .venv/uv.txt
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/uv.txt
	@.venv/bin/uv pip install --python $(PYTHON) --require-hashes --compile-bytecode -r requirements.txt \
		2>&1 | sed -u '/^ + /d; s/^/    /'
	@touch $@

lab-install: install .venv/lab-installed

.venv/lab-installed: Makefile
	@echo "--> packages of the lab: $(LAB_PACKAGES)"
	@# The lab starts its own package cache and registry, and Prometheus is here for promtool: the machine runs none.
	@for unit in apt-cacher-ng docker-registry prometheus; do \
		[ -e /lib/systemd/system/$$unit.service ] || ln -sf /dev/null /etc/systemd/system/$$unit.service; done
	@dpkg-query -W $(LAB_PACKAGES) > /dev/null 2>&1 || { apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends install $(LAB_PACKAGES) \
		2>&1 < /dev/null | sed -n -u 's/^Setting up /    /p'; dpkg-query -W $(LAB_PACKAGES) > /dev/null; }
	@touch $@

sabotage-install: lab-install .venv/sabotage-installed

.venv/sabotage-installed: Makefile lab/browser/package-lock.json
	@echo "--> other clients: $(SABOTAGE_PACKAGES), livekit-client"
	@# coturn is here for its client.
	@[ -e /lib/systemd/system/coturn.service ] || ln -sf /dev/null /etc/systemd/system/coturn.service
	@dpkg-query -W $(SABOTAGE_PACKAGES) > /dev/null 2>&1 || { apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends install $(SABOTAGE_PACKAGES) \
		2>&1 < /dev/null | sed -n -u 's/^Setting up /    /p'; dpkg-query -W $(SABOTAGE_PACKAGES) > /dev/null; }
	@cd lab/browser && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

lab-up: lab-install
	$(PYTHON) -m lab up

lab-down: install
	$(PYTHON) -m lab down

demo: lab-up
	$(PYTHON) -m callready.secrets inventories/lab
	PYINFRA_YES=1 $(PYINFRA) inventories/lab deploy.py
	@$(MAKE) --no-print-directory verify ENV=lab

# The same with a fifth host that watches the four.
demo-watching: lab-install
	$(PYTHON) -m lab up sfu1 turn1 turn2 app1 mon1
	$(PYTHON) -m lab wheels
	$(PYTHON) -m callready.secrets inventories/lab-watching
	PYINFRA_YES=1 $(PYINFRA) inventories/lab-watching deploy.py
	@$(MAKE) --no-print-directory verify ENV=lab-watching

# The same with a Redis and a host that records.
demo-recording: lab-install
	$(PYTHON) -m lab up sfu1 turn1 turn2 app1 redis1 egress1
	$(PYTHON) -m lab recorder
	$(PYTHON) -m callready.secrets inventories/lab-recording
	PYINFRA_YES=1 $(PYINFRA) inventories/lab-recording deploy.py
	@$(MAKE) --no-print-directory verify ENV=lab-recording

# Three SFUs that are one service, and two TURN hosts of one pool.
demo-cluster: lab-install
	$(PYTHON) -m lab up sfu1 sfu2 sfu3 turn1 turn2 app1 redis1
	$(PYTHON) -m callready.secrets inventories/cluster
	PYINFRA_YES=1 $(PYINFRA) inventories/cluster deploy.py
	@$(MAKE) --no-print-directory verify ENV=cluster

secrets: install
	$(PYTHON) -m callready.secrets $(INVENTORY)

trust: install
	@$(PYTHON) -m callready.trust $(INVENTORY)

rotate: install
	$(PYTHON) -m callready.rotate $(INVENTORY) $(or $(WHAT),turn)

rollback remove history: install
	$(if $(HOST)$(filter-out remove,$@),,$(error make remove needs HOST=…))
	$(PYINFRA) $(INVENTORY) $@.py $(if $(HOST),--limit $(HOST))

logs: install
	$(PYINFRA) $(INVENTORY) logs.py --limit monitor $(foreach each,HOST UNIT SINCE MATCH,$(if $($(each)),\
		--data log_$(shell echo $(each) | tr A-Z a-z)='$($(each))'))

verify: install
	$(CALLER) $(PYTHON) -m callready.verify $(INVENTORY)

alert-test: install
	@$(PYTHON) -m callready.alert_test $(INVENTORY)

export: install
	@$(PYTHON) -m callready.export $(INVENTORY) $(FOLDER)

capacity: install
	@$(PYTHON) -m callready.capacity $(INVENTORY) $(KIND) $(if $(ROOM),--room $(ROOM)) \
		$(if $(SPEAKERS),--speakers $(SPEAKERS)) $(if $(RELAYED),--relayed $(RELAYED))

# What makes the calls is built where the Internet is; the lab's callers have none.
load: install load/generator
	@$(CALLER) $(PYTHON) -m callready.load $(INVENTORY) $(KIND) $(foreach each,ROOMS ROOM SPEAKERS RELAYED BY STEPS \
		HOLD RATE CONFIRM,$(if $($(each)),--$(shell echo $(each) | tr A-Z a-z) $($(each))))

load/generator: $(filter-out load/generator,$(wildcard load/*))
	@echo "--> $@, which makes calls"
	@command -v go > /dev/null || { echo "Go is missing: install 1.26 or later (https://go.dev/dl/), then try again"; exit 1; }
	@CGO_ENABLED=0 go build -C load -trimpath -o generator .

bench: lab-install
	$(PYTHON) -m bench $(if $(AGAINST),--against $(AGAINST))

bench-verification: lab-up
	$(PYTHON) -m callready.secrets inventories/lab
	PYINFRA_YES=1 $(PYINFRA) inventories/lab deploy.py
	$(PYTHON) -m bench.verification --write

docs: install
	$(PYTHON) -m callready.docs

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache > .venv/imports || { cat .venv/imports; exit 1; }
	.venv/bin/shellcheck -x -P SCRIPTDIR $(SCRIPTS)
	.venv/bin/shfmt -d -i 4 -ci -sr $(SCRIPTS)

unit: install
	$(PYTHON) -m pytest -q -n 2 -m "not tools" tests/unit

# Those of the unit tests that need root, or programs that lab-install brings.
tool-tests: lab-install
	$(PYTHON) -m pytest -q -n 2 -m tools tests/unit

check: lint unit

lab-tests: lab-install
	trap '$(PYTHON) -m lab down' EXIT; $(PYTHON) -m pytest -v -n 2 --dist loadgroup -m "not alone and not long" tests/lab && \
		$(PYTHON) -m pytest -v -m alone tests/lab

fault-tests: lab-install
	trap '$(PYTHON) -m lab down' EXIT; $(PYTHON) -m pytest -v tests/faults

# The long sweep; it takes an hour.
faults: export FAULTS_RESULTS = $(CURDIR)/.venv/faults.json
faults: lab-install
	trap '$(PYTHON) -m lab down' EXIT; $(PYTHON) -m pytest -v tests/faults --long && \
		$(PYTHON) -m bench.faults $(FAULTS_RESULTS)

# Every sabotage with the whole verification; it takes over an hour.
sabotage: sabotage-install lab-up
	trap '$(PYTHON) -m lab down' EXIT; $(PYTHON) -m callready.secrets inventories/lab && \
		PYINFRA_YES=1 $(PYINFRA) inventories/lab deploy.py && \
		$(PYTHON) -m tests.sabotage --clients --clean 30 --results .venv/sabotage.json --write

test: check tool-tests lab-tests fault-tests

# What waits for alerts and for calls to come back; it takes an hour.
test-long: lab-install
	trap '$(PYTHON) -m lab down' EXIT; $(PYTHON) -m pytest -v -s -m long tests/lab
