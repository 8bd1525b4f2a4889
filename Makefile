# make builds ./kl3m, make demo shows it at work with the small model of tests/tiny, make model gets
# the real one. It is read by GNU make and by BSD make. CC and CFLAGS may be given: what correctness
# needs (floating-point expressions as they are written, threads) is in NEEDED, which comes after
# CFLAGS and has the last word.
CC = cc
CFLAGS = -O2
PYTHON = python3
PREFIX = /usr/local
OUT = kl3m
BENCH = tests/bench/bench
BENCH_SOURCE = tests/bench/bench.c
HUB = alea-institute/kl3m-002-170m
MODEL = kl3m-002-170m.bin

WARNINGS = -Wall -Wextra -Wshadow -Wconversion
NEEDED = -std=c11 -ffp-contract=off -fno-unsafe-math-optimizations -fno-associative-math \
         -fno-reciprocal-math -fsigned-zeros -pthread

$(OUT): kl3m.c tokenizer.c tokenizer.h
	$(CC) $(WARNINGS) $(CFLAGS) $(NEEDED) -o $@ kl3m.c tokenizer.c $(LDFLAGS) -lm

demo: $(OUT) demo.bin
	./$(OUT) -m demo.bin -p "Governing Law.\n" -t 0.3 -n 32 -s 1

demo.bin: $(OUT) export_weights.py tests/tiny/config.json tests/tiny/tokenizer.json \
          tests/tiny/model.safetensors
	$(PYTHON) export_weights.py tests/tiny -o $@
	./$(OUT) -m $@ --learn -o $@ -s 1 -q

# The last step holds the file against the outputs that its makers published.
model: $(OUT) $(MODEL)
	$(PYTHON) tests/card.py $(MODEL)
	@echo "./$(OUT) -m $(MODEL) --quantize q8 -o OUT writes it in a quarter of the size: four times" \
		"as fast for one text (README, Weight types)"

# Then it teaches itself what it is likely to say: guesses that make decoding faster, and change no
# text. A newer program is no reason to make it again (GNU make could say so with "| $(OUT)", which
# BSD's does not know).
$(MODEL): $(OUT)
	[ -f $@ ] || \
		{ $(PYTHON) export_weights.py $(HUB) -o $@ && ./$(OUT) -m $@ --learn -o $@ -s 1; }

test: $(OUT)
	$(PYTHON) tests/run.py

$(BENCH): $(BENCH_SOURCE) kl3m.c tokenizer.c tokenizer.h
	$(CC) $(WARNINGS) -Wno-unused-function $(CFLAGS) $(NEEDED) -o $@ $(BENCH_SOURCE) tokenizer.c \
		$(LDFLAGS) -lm

# How fast the model is here, against this machine's own limits; with REPLAY=FILE what guesses are
# worth on the lines of FILE.
bench: $(OUT) $(BENCH) $(MODEL)
	replay="$(REPLAY)" && $(BENCH) $(MODEL) --kl3m $(OUT) $${replay:+--replay "$$replay"}

# The same for a file of 1,000 short prompts: a minute or two.
bench-prompts: $(BENCH) $(MODEL)
	$(BENCH) $(MODEL) --prompts

# Hostile inputs, FUZZ_SECONDS for each kind of them; needs clang. tests/fuzz/fuzz.py says more.
FUZZ_SECONDS = 60

fuzz:
	$(PYTHON) tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

# With the man page and the shells' completions, made of the program's own --help. The model goes
# along if it is here.
SHARE = "$(DESTDIR)$(PREFIX)/share
PAGES = man/man1/kl3m.1 bash-completion/completions/kl3m zsh/site-functions/_kl3m \
        fish/vendor_completions.d/kl3m.fish

install: $(OUT)
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 $(OUT) "$(DESTDIR)$(PREFIX)/bin/kl3m"
	pages=$$(mktemp -d) && $(PYTHON) tests/make/pages.py $(OUT) "$$pages" && \
		mv "$$pages/kl3m.bash" "$$pages/kl3m" && for page in $(PAGES); do \
			install -d $(SHARE)/$${page%/*}" && \
			install -m 644 "$$pages/$${page##*/}" $(SHARE)/$$page" || exit; \
		done && rm -r "$$pages"
	if [ -f $(MODEL) ]; then install -d $(SHARE)/kl3m" && \
		install -m 644 $(MODEL) $(SHARE)/kl3m/"; fi

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/kl3m" $(SHARE)/kl3m/$(MODEL)"
	for page in $(PAGES); do rm -f $(SHARE)/$$page"; done
	-rmdir $(SHARE)/kl3m" 2>/dev/null

# The source as it is committed, its checksum and its bill of materials: the same bytes each time.
dist:
	name=kl3m-$$(sed -n 's/^#define VERSION "\(.*\)"/\1/p' kl3m.c) && \
		git archive --format=tar --prefix="$$name/" HEAD | gzip -9n > "$$name.tar.gz" && \
		sha256sum "$$name.tar.gz" > "$$name.tar.gz.sha256" && cat "$$name.tar.gz.sha256" && \
		$(PYTHON) tests/make/sbom.py "$$name.tar.gz" > "$$name.spdx.json"

# What was downloaded stays: $(MODEL) is removed by hand.
clean:
	rm -f $(OUT) $(BENCH) demo.bin kl3m-*.tar.gz kl3m-*.tar.gz.sha256 kl3m-*.spdx.json

# A break while the table is made leaves the model as it was, and make need not remove it.
.PRECIOUS: demo.bin $(MODEL)
.PHONY: demo model test bench bench-prompts fuzz install uninstall dist clean
