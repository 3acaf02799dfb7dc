# Two commands matter: `make demo` boots a Linux guest, `make test` passes all tests. Both install what they need.

CARGO ?= cargo
TARGET := x86_64-unknown-linux-gnu
OUT := $(abspath $(or $(CARGO_TARGET_DIR),target))/$(TARGET)
BIN := $(OUT)/release/halyard
# Where `make install` puts things; DESTDIR is for packagers.
PREFIX ?= /usr/local
SHARE = $(DESTDIR)$(PREFIX)/share

.PHONY: help deps build install demo test stories soak bench fuzz clean

help:
	@echo "make demo    boot a stock Debian kernel in a Halyard VM, with live output"
	@echo "make test    formatting, lints, unit tests, guest stories, architecture"
	@echo "make soak    long rounds, load and fuzzing"
	@echo "make bench   speed and memory beside peers, as ratios (writes bench-results.json)"
	@echo "make build   the release binary: $(BIN)"
	@echo "make install the binaries, their manual and completions for shells, below PREFIX ($(PREFIX))"

deps:
	@scripts/install

# The program that reads quotes is built apart: its crates ask for features of others that the monitor has no use for.
build: deps
	$(CARGO) build --release --quiet -p vmm
	$(CARGO) build --release --quiet -p halyard-verify

install: build
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/halyard
	install -D -m 755 $(BIN)-verify $(DESTDIR)$(PREFIX)/bin/halyard-verify
	install -D -m 644 resources/completions/halyard.bash $(SHARE)/bash-completion/completions/halyard
	install -D -m 644 resources/completions/halyard.zsh $(SHARE)/zsh/site-functions/_halyard
	install -D -m 644 resources/completions/halyard.fish $(SHARE)/fish/vendor_completions.d/halyard.fish
	install -d $(SHARE)/man/man1
	$(BIN) man $(SHARE)/man/man1

demo:
	@scripts/demo

test: deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	$(CARGO) clippy -p halyard-tests --test soak --test soak_firmware --test soak_kernels --test soak_memory --test soak_protected --test soak_vcpus --test soak_quotes --quiet -- -D warnings
	$(CARGO) build --release --quiet -p vmm
	$(CARGO) build --release --quiet -p halyard-verify
	HALYARD_BIN=$(BIN) $(CARGO) test --workspace --exclude halyard-tests
	HALYARD_BIN=$(BIN) $(CARGO) test -p halyard-tests -- --test-threads 2

# Only the stories; FILTER chooses some of them.
stories: build
	HALYARD_BIN=$(BIN) $(CARGO) test -p halyard-tests --test stories --test kernel_stories -- --test-threads 2 $(FILTER)

soak: build
	@HALYARD_BIN=$(BIN) scripts/soak

# The kernel of a host with private memory is built, where it is not there yet, which takes minutes.
bench: build
	@scripts/install soak
	$(CARGO) build --release --quiet -p halyard-tests --bins
	@HALYARD_BIN=$(BIN) $(OUT)/release/bench
	@$(CARGO) test --quiet -p vmm --test quotes -- --ignored --nocapture
	@HALYARD_BIN=$(BIN) $(CARGO) test --quiet -p halyard-tests --test soak_protected soak_the_time -- --nocapture

clean:
	$(CARGO) clean
