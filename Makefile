# Tollgate. `make help` lists what there is; README.md says what it is.
#
# Each target looks for the Debian packages it needs and installs the missing ones through apt-get, saying so; where there is no
# apt-get, it only says what to install. Nothing else outside of this folder and of cargo's own is written.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# rustup puts cargo here; a shell that was open before does not know it yet.
export PATH := $(HOME)/.cargo/bin:$(PATH)

ARGS ?=
VENV := $(CURDIR)/.venv
OPENAI := openai==2.54.0
OPENAI_STAMP := $(VENV)/.with-$(OPENAI)

# A C compiler and cmake: zlib-ng, zstd, jemalloc and ring are built from their sources.
BUILD_PACKAGES := gcc libc6-dev cmake pkg-config
TEST_PACKAGES := $(BUILD_PACKAGES) redis-server faketime python3 python3-venv python3-pip

# $(call packages,NAMES)
define packages
@missing=(); \
for name in $(1); do \
	[ "$$(dpkg-query -W -f='$${db:Status-Status}' "$$name" 2>/dev/null || true)" = installed ] || missing+=("$$name"); \
done; \
if [ "$${#missing[@]}" -gt 0 ]; then \
	if command -v apt-get >/dev/null; then \
		sudo=(); \
		if [ "$$(id -u)" -ne 0 ]; then \
			command -v sudo >/dev/null || { echo "Please install as root: apt-get install $${missing[*]}" >&2; exit 1; }; \
			sudo=(sudo); \
		fi; \
		echo "Installing Debian packages: $${missing[*]}"; \
		"$${sudo[@]}" apt-get update -q; \
		"$${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$${missing[@]}"; \
	else \
		echo "No apt-get here. What Debian calls $${missing[*]} is needed; going on as if it were there." >&2; \
	fi; \
fi
endef

.PHONY: help
help: ## what can be made
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.PHONY: demo
demo: build ## run a gateway with simulated nodes, offline; the first build takes some minutes. ARGS="--port 8081"
	cargo run --release --locked -p tollgate -- demo $(ARGS)

.PHONY: test
test: lint python ## lint, then every test: units, and the real binary over real sockets
	TOLLGATE_TEST_PYTHON=$(VENV)/bin/python cargo test --workspace --locked $(ARGS)

.PHONY: lint
lint: toolchain ## clippy without warnings, formatting, documentation without broken links
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked

.PHONY: build
build: toolchain ## the release binary, target/release/tollgate
	@echo "Building for release; the first time this takes some minutes."
	cargo build --release --locked -p tollgate

.PHONY: bench
bench: build ## measure the gateway beside a bare proxy on this machine. ARGS="..." for the load generator
	cargo run --release --locked -p tollgate-load -- bench $(ARGS)

.PHONY: benchfaults
benchfaults: build ## let one of three nodes fail under load, each way in turn. ARGS="--rate 300 --duration 60s"
	cargo run --release --locked -p tollgate-load -- faults $(ARGS)

.PHONY: benchledger
benchledger: testpackages toolchain ## measure a decision of the ledger, in memory and in Redis. ARGS="..." as for bench
	cargo run --release --locked -p tollgate-load -- ledger $(ARGS)

.PHONY: benchoutage
benchoutage: testpackages build ## measure what callers feel while Redis stands still for ten seconds
	cargo run --release --locked -p tollgate-load -- outage $(ARGS)

.PHONY: deny
deny: toolchain ## licences, sources and duplicates of all dependencies; works offline once they are fetched
	@cargo deny --version >/dev/null 2>&1 || { echo "Installing cargo-deny; this takes some minutes."; cargo install --locked cargo-deny; }
	cargo fetch --locked
	cargo deny --offline --locked check bans licenses sources

.PHONY: fmt
fmt: toolchain ## format the code
	cargo fmt --all

# Rust and what its C dependencies need.
.PHONY: toolchain
toolchain:
	@command -v cargo >/dev/null || { echo "Rust is missing. Get it from https://rustup.rs, then run make again." >&2; exit 1; }
	$(call packages,$(BUILD_PACKAGES))

# The official OpenAI client for the black-box tests, in a venv of its own.
.PHONY: python
python: testpackages $(OPENAI_STAMP)

.PHONY: testpackages
testpackages:
	$(call packages,$(TEST_PACKAGES))

$(OPENAI_STAMP): | testpackages
	@echo "Making $(VENV) with $(OPENAI) for the tests."
	@rm -rf $(VENV)
	@python3 -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(OPENAI)"
	@touch "$@"
