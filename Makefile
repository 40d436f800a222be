# The commands of the project; `make` lists them. PYTHON=python3.13 chooses a Python, 3.11 or newer.

PYTHON ?= python3
COMPOSE ?= docker compose
SHELL := /bin/sh

# An environment for each Python, so that two versions can be tested side by side
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
RUN_READY := $(VENV)/.ready-to-run
TEST_READY := $(VENV)/.ready-to-test

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- On this machine ---------------------------------------------------------------------------------------

.PHONY: run
run: $(RUN_READY) ## Start it all here: database, backend, a client, two background instances; Ctrl-C ends it
	@exec $(VENV)/bin/python run.py

# The environment wins over the env file, as everywhere
LOAD_BACKEND_ENV = saved=$$(export -p); set -a; . ./env/backend.env; set +a; eval "$$saved"

.PHONY: migrate
migrate: $(RUN_READY) ## Apply all migrations to the database that env/backend.env or the environment names
	@$(LOAD_BACKEND_ENV); exec $(VENV)/bin/python backend.py migrate

.PHONY: migrate-down
migrate-down: $(RUN_READY) ## Take the last migration back
	@$(LOAD_BACKEND_ENV); exec $(VENV)/bin/python backend.py rollback

# ---- In containers -----------------------------------------------------------------------------------------

.PHONY: compose-up
compose-up: .env ## Build and start the same system in containers, and wait until it is healthy
	@$(COMPOSE) up --detach --build --wait
	@address=http://localhost:$$($(COMPOSE) port backend 8000 | sed 's/.*://'); \
	echo "try the API    $$address/docs"; \
	echo "records        $$address/api/data"; \
	echo "shared file    $(COMPOSE) exec background tail -f /shared/data.txt"; \
	echo "client's lines $(COMPOSE) exec client tail -f /journal/logs-1.txt"; \
	echo "what they say  $(COMPOSE) logs --follow"; \
	echo "stop           make compose-down"

# Clients and exporters go through the proxy
.PHONY: compose-scale
compose-scale: .env ## The same with three backends behind HAProxy
	@BACKEND_HOST=proxy $(COMPOSE) --profile scale up --detach --build --wait
	@address=http://localhost:$$($(COMPOSE) --profile scale port proxy 8000 | sed 's/.*://'); \
	echo "try the API    $$address/docs"; \
	echo "records        $$address/api/data"; \
	echo "what they say  $(COMPOSE) --profile scale logs --follow"; \
	echo "stop           make compose-down"

.PHONY: compose-down
compose-down: .env ## Stop and remove the containers; the volumes with the data stay
	@$(COMPOSE) --profile scale down --remove-orphans

.PHONY: compose-clean
compose-clean: .env ## Remove the containers and all that they stored
	@$(COMPOSE) --profile scale down --remove-orphans --volumes

# Compose reads it by itself. It must stay as long as the database's volume does.
.env:
	@umask 077; printf 'DB_PASS=%s\n' "$$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" >$@
	@echo "made .env with a random password for the database; keep it as long as the database's volume"

# ---- Tests -------------------------------------------------------------------------------------------------

.PHONY: test
test: $(TEST_READY) test-tools ## Install what the tests need and run them all; ARGS="-k name" for some
	@$(VENV)/bin/python -m pytest --numprocesses=5 --dist=loadfile $(ARGS)

.PHONY: test-compose
test-compose: $(TEST_READY) ## Test the containers, from the client's journal to the shared file; needs Docker
	@$(VENV)/bin/python -m pytest tests/compose $(ARGS)

.PHONY: test-slow
test-slow: $(TEST_READY) test-tools .syslog ## Faults, attacks and backlogs that take their time: 10 minutes
	@$(VENV)/bin/python -m pytest -m slow tests tests/slow --numprocesses=4 --dist=load $(ARGS)

.PHONY: chaos
chaos: $(TEST_READY) ## Strike the whole pipeline with faults under load, then compare all lines; MINUTES=10 SEED=1
	@PYTHONPATH=. $(VENV)/bin/python -W ignore tests/chaos.py --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

# Patroni as it is released, with a PostgreSQL of today; and as Debian has it, by etcd's old protocol: see docs/ha.md
PATRONI ?= release debian
PATRONI_release := --patroni $(CURDIR)/.venv-patroni/bin/patroni --etcd 3 --postgres 18
PATRONI_debian := --patroni /usr/bin/patroni --etcd 2 --postgres 16

.PHONY: test-ha
test-ha: $(TEST_READY) ha-tools $(if $(filter release,$(PATRONI)),.venv-patroni/.ready) ## Strike three PostgreSQL under Patroni while lines come in; MINUTES=10 PATRONI=release SEED=1
	@minutes=$$(awk 'BEGIN { print $(or $(MINUTES),10) / $(words $(PATRONI)) }'); \
	$(foreach one,$(PATRONI),PYTHONPATH=. $(VENV)/bin/python -W ignore tests/chaos_patroni.py $(PATRONI_$(one)) \
	  --minutes $$minutes $(if $(SEED),--seed $(SEED)) &&) :

.PHONY: bench
bench: $(TEST_READY) bench-tools ## Measure against what people would use instead; ROUNDS=3 ONLY="1 4" for some rows
	@PYTHONPATH=.:tests $(VENV)/bin/python -W ignore bench/bench.py --rounds $(or $(ROUNDS),3) $(if $(ONLY),--only $(ONLY))

.PHONY: bench-scale
bench-scale: $(TEST_READY) bench-tools ## Measure how it bears growth: 1 and 10 million records; ROWS=50 for more
	@PYTHONPATH=.:tests $(VENV)/bin/python -W ignore -m bench.scale --rows $(or $(ROWS),10) --rounds $(or $(ROUNDS),3) \
	  $(if $(SETTINGS),--settings $(SETTINGS))

.PHONY: lint
lint: $(TEST_READY) ## Check style and types: ruff, mypy --strict
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy --strict .

# Programs that the tests run, and Debian's packages that bring them; RUNLEVEL=1 keeps those from starting a service
TEST_TOOLS := chromium:chromium curl:curl goaccess:goaccess haproxy:haproxy jq:jq logrotate:logrotate \
  mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs nginx:nginx-light openssl:openssl pgbouncer:pgbouncer \
  prometheus-node-exporter:prometheus-node-exporter promtool:prometheus systemd-analyze:systemd

.PHONY: test-tools
test-tools:
	@$(call install,$(TEST_TOOLS))

.PHONY: ha-tools
ha-tools:
	@$(call install,etcd:etcd-server $(if $(filter debian,$(PATRONI)),/usr/bin/patroni:patroni))

define install
PATH=$$PATH:/usr/sbin:/sbin; missing=; \
for tool in $(1); do command -v $${tool%:*} >/dev/null || missing="$$missing $${tool#*:}"; done; \
if [ -z "$$missing" ]; then :; \
elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  echo "installing for the tests:$$missing"; \
  apt-get update -qq; \
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
else \
  echo "the tests need these: sudo apt-get install$$missing" >&2; \
  exit 1; \
fi
endef

# Debian has one syslog daemon at a time installed, and a test's may not replace the machine's: they are unpacked here
SYSLOG_PACKAGES := rsyslog libestr0 libfastjson4 liblognorm5 \
  syslog-ng-core syslog-ng-mod-http libivykis0 libnet1 libpcre3 libwrap0

.syslog:
	@echo "unpacking for the tests: $(SYSLOG_PACKAGES)"
	@rm -rf .syslog.new && mkdir .syslog.new
	@if [ "$$(id -u)" = 0 ]; then apt-get update -qq; fi
	@cd .syslog.new && apt-get download -qq -o APT::Sandbox::User=root $(SYSLOG_PACKAGES) && \
	  for package in *.deb; do dpkg-deb --extract $$package . || exit 1; done && rm *.deb
	@mv .syslog.new .syslog

.PHONY: bench-tools
bench-tools:
	@if command -v wrk >/dev/null && command -v rsyslogd >/dev/null && command -v curl >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing the references of the benchmarks"; \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    wrk rsyslog rsyslog-pgsql curl >/dev/null; \
	else \
	  echo "the benchmarks need these: sudo apt-get install wrk rsyslog rsyslog-pgsql curl" >&2; \
	  exit 1; \
	fi

# ---- Housekeeping ------------------------------------------------------------------------------------------

.PHONY: update-swagger-ui
update-swagger-ui: ## Renew the Swagger UI in static/ from npm: the newest 5.x, or VERSION=5.x.y
	@sh static/vendor.sh swagger-ui swagger-ui-dist@$(or $(VERSION),5) swagger-ui.css swagger-ui-bundle.js \
	  swagger-ui-bundle.js.LICENSE.txt favicon-16x16.png favicon-32x32.png LICENSE NOTICE

.PHONY: update-uplot
update-uplot: ## Renew uPlot, which draws the overview's chart, likewise: the newest 1.x, or VERSION=1.x.y
	@sh static/vendor.sh uplot uplot@$(or $(VERSION),1) dist/uPlot.iife.min.js dist/uPlot.min.css LICENSE

.PHONY: clean
clean: ## Remove environments and caches; data under var/ and volumes stay
	@rm -rf .venv-* .syslog .syslog.new .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis artifacts
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Versions and hashes of all that is installed: a lock for each of the image, `make run` and the tests
.PHONY: update-locks
update-locks: ## Renew locks/ after a change of pyproject.toml; UPGRADE=1 takes the newest of what it leaves open
	@$(PYTHON) -m venv .venv-locks
	@.venv-locks/bin/python -m pip install -q --disable-pip-version-check uv
	@for lock in "backend pyproject.toml" "embedded pyproject.toml --extra embedded" \
	  "test pyproject.toml --extra embedded --extra test" "patroni --group patroni"; do \
	  .venv-locks/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
	    --annotation-style line $(if $(UPGRADE),--upgrade) -o locks/$${lock%% *}.txt \
	    $${lock#* } || exit 1; \
	done

$(RUN_READY): LOCK := locks/embedded.txt
$(TEST_READY): LOCK := locks/test.txt
$(TEST_READY): $(RUN_READY)
$(RUN_READY) $(TEST_READY): locks/embedded.txt locks/test.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "this needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -1)." \
	    "Name another: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; exit 1; }
	@echo "installing $(LOCK) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $(LOCK)
	@touch $@

# PostgreSQL does not run as root, nor does Patroni, and root's own Python is not for others
.venv-patroni/.ready: locks/patroni.txt
	@echo "installing $< into .venv-patroni"
	@$(if $(filter 0,$(shell id -u)),/usr/bin/python3,$(PYTHON)) -m venv .venv-patroni
	@.venv-patroni/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r $<
	@touch $@
