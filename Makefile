# Headstart. `make demo` shows it at work, `make test` tests everything on small models.

CARGO ?= cargo
HEADSTART = target/release/headstart

.DEFAULT_GOAL := help
.PHONY: help demo test test-full overload sim sim-sabotage verify fix bench chaos fuzz fuzz-guided soak image build setup setup-test

help: ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## Build, fetch two small models, start a cluster, ask it something
	@$(HEADSTART) models pull smollm2 qwen2.5-coder > /dev/null
	@$(HEADSTART) demo

test: setup-test ## Test everything, on small models, golden files included
	$(CARGO) test --release --locked --workspace --no-run
	$(HEADSTART) models pull smollm2
	$(CARGO) test --release --locked --workspace

test-full: setup-test ## What `make test` leaves out: the golden files of SmolLM2 with Qwen2.5-Coder
	$(CARGO) test --release --locked --workspace --no-run
	$(HEADSTART) models pull smollm2 qwen2.5-coder
	$(CARGO) test --release --locked --workspace --test golden --test golden_full -- --ignored

overload: setup-test ## Measure goodput, refusals and memory at four times the capacity
	OVERLOAD_SECONDS=$${OVERLOAD_SECONDS:-10} $(CARGO) test --release --locked --workspace --test overload -- --ignored --nocapture

SEEDS ?= 1000
sim: build ## Simulate SEEDS=n whole clusters with faults and check what must hold in them
	@target/release/headstart-sim --seeds $(SEEDS)

sim-sabotage: setup ## Build three deliberate bugs in, one after the other, and show the seed that catches each
	@for bug in window epoch fence; do echo "sabotage-$$bug:"; \
	$(CARGO) run --release --locked -q -p headstart-sim --features sabotage-$$bug -- \
	--seeds 10000 --expect-failure || exit 1; done

verify: setup ## Check format, lints, documentation and dependencies; writes nothing to the sources
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked --workspace --no-deps --quiet
	@if command -v cargo-deny > /dev/null; then $(CARGO) deny --locked check; \
	else echo "cargo-deny is not installed: deny.toml not checked"; fi

fix: setup ## Apply format and the lints' own corrections
	$(CARGO) clippy --release --workspace --all-targets --fix --allow-dirty --allow-staged
	$(CARGO) fmt --all

bench: build ## Measure the engine on SmolLM2 beside this machine's memory bandwidth
	@$(HEADSTART) bench engine --model smollm2

MINUTES ?= 3
SCENARIO ?= chaos
RUNS ?= 1000000
chaos: build setup-test ## Kill, pause, drain and part the processes of a cluster under load: MINUTES=3 SCENARIO=chaos|etcd-down|etcd-empty|rolling|calm
	@target/release/chaos --minutes $(MINUTES) --scenario $(SCENARIO) --model "$$($(HEADSTART) models pull smollm2)" $(CHAOS)

fuzz: build ## Feed every parser that faces outside with RUNS=1000000 inputs that are almost right
	@target/release/fuzz --runs $(RUNS) $(FUZZ)

SECONDS_EACH ?= 60
fuzz-guided: build setup-test ## Run libFuzzer on every such parser, guided by coverage: SECONDS_EACH=60 TARGET=gguf
	@scripts/fuzz-guided $(SECONDS_EACH) $(TARGET)

soak: build setup-test ## Steady load for MINUTES=3, with memory, slots and pages sampled and drawn
	@target/release/soak --minutes $(MINUTES) --model "$$($(HEADSTART) models pull smollm2)" $(SOAK)

image: ## Build the container image with docker, podman or buildah, and check what a machine without a GPU can
	@scripts/image-check

build: setup ## Build the binaries
	$(CARGO) build --release --locked --workspace --bins

setup: ## Install what building needs, or say what is missing
	@scripts/setup

setup-test:
	@scripts/setup --test
