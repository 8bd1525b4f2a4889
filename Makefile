# make builds ./kl3m. CC and CFLAGS may be given: what correctness needs (floating-point expressions as they are written,
# threads) is in NEEDED, which comes after CFLAGS and has the last word.
CC = cc
CFLAGS = -O2
PYTHON = python3
OUT = kl3m

WARNINGS = -Wall -Wextra -Wshadow -Wconversion
NEEDED = -std=c11 -ffp-contract=off -fno-unsafe-math-optimizations -fno-associative-math -fno-reciprocal-math \
         -fsigned-zeros -pthread

$(OUT): kl3m.c tokenizer.c tokenizer.h
	$(CC) $(WARNINGS) $(CFLAGS) $(NEEDED) -o $@ kl3m.c tokenizer.c $(LDFLAGS) -lm

test: $(OUT)
	$(PYTHON) tests/run.py

clean:
	rm -f $(OUT)

.PHONY: test clean
