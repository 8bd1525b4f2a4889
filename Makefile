# kl3m: make builds ./kl3m. CC and CFLAGS may be given: what correctness needs is in NEEDED, which comes after CFLAGS
# and so has the last word.
CC = cc
CFLAGS = -O2
WARNINGS = -Wall -Wextra -Wshadow -Wconversion
NEEDED = -std=c11 -ffp-contract=off -pthread
PYTHON = python3

kl3m: kl3m.c tokenizer.c tokenizer.h
	$(CC) $(WARNINGS) $(CFLAGS) $(NEEDED) -o $@ kl3m.c tokenizer.c -lm

test: kl3m
	$(PYTHON) tests/run.py

clean:
	rm -f kl3m

.PHONY: test clean
