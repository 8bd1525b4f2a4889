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

# The model goes along if it is here.
install: $(OUT)
	install -d "$(DESTDIR)$(PREFIX)/bin"
	install -m 755 $(OUT) "$(DESTDIR)$(PREFIX)/bin/kl3m"
	if [ -f $(MODEL) ]; then install -d "$(DESTDIR)$(PREFIX)/share/kl3m" && \
		install -m 644 $(MODEL) "$(DESTDIR)$(PREFIX)/share/kl3m/"; fi

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/kl3m" "$(DESTDIR)$(PREFIX)/share/kl3m/$(MODEL)"
	-rmdir "$(DESTDIR)$(PREFIX)/share/kl3m" 2>/dev/null

# What was downloaded stays: $(MODEL) is removed by hand.
clean:
	rm -f $(OUT) $(BENCH) demo.bin

# A break while the table is made leaves the model as it was, and make need not remove it.
.PRECIOUS: demo.bin $(MODEL)
.PHONY: demo model test bench bench-prompts install uninstall clean
