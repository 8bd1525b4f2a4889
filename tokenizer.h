// tokenizer.h: byte-level BPE behind added tokens, as the `tokenizers` library computes it from a
// GPT-2 style tokenizer.json, NFC before it included. It knows nothing of models and stands alone
// with tokenizer.c: the tables it reads are one block of bytes that export_weights.py makes (their
// layout is at the top of tokenizer.c), used where they lie, never copied.
//
//     Tokenizer t;
//     const char *flaw = tokenizer_open(&t, tables, size);    // NULL: good
//     uint32_t *ids = malloc(tokenizer_most_ids(&t, n) * sizeof *ids);
//     ptrdiff_t count = tokenizer_encode(&t, text, n, false, ids);
//     for (ptrdiff_t i = 0; i < count; i++) {
//         size_t length;
//         const char *bytes = tokenizer_text(&t, ids[i], &length);
//         fwrite(bytes, 1, length, stdout);                   // the same bytes again
//     }
//     tokenizer_close(&t);
//
// One Tokenizer serves one thread at a time, since it remembers words; several may share the
// tables.
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// A hash table's slot: key (a, b), value (x, y).
typedef struct { uint32_t a, b, x, y; } TokenizerSlot;

typedef struct {                   // a word met before, and its ids
    uint64_t key[2];
    uint32_t ids[11];
    uint8_t length, count;         // length 0: none yet
} TokenizerWord;

typedef struct {
    const TokenizerSlot *merges;   // (left, right) -> (rank, token)
    const TokenizerSlot *edges;    // (node, byte) -> (child, 0)
    const uint32_t *node_token;    // [nodes] the added token that ends at a node, or TOKENIZER_NONE
    const uint32_t *byte_token;    // [256]
    const uint32_t *text_offset;   // [tokens + 1]
    const uint8_t *flags;          // [tokens]
    const char *text;
    uint32_t tokens, merge_slots, edge_slots;
    uint32_t root[2];              // of the tries of added tokens: those searched first, those
                                   // searched in what is left
    uint32_t first[2][256];        // the node behind the root on this byte, or 0: no child
    uint8_t second[2][8192];       // bit b0 * 256 + b1: does any token of the trie begin with
                                   // these two bytes?
    uint8_t ascii_class[128];
    TokenizerWord *words;          // [TOKENIZER_WORDS], allocated by the first encoding; NULL:
                                   // nothing is remembered
    struct TokenizerNfc *nfc;      // what NFC needs; NULL: texts are taken as they are
    bool has_marks;                // the text that is being encoded may change by it
} Tokenizer;

#define TOKENIZER_NONE UINT32_MAX
enum { TOKENIZER_WORDS = 8192 };

// Checks every index in the tables, so that whatever they hold, nothing later reads outside them or
// searches them for long. The tables must outlive the Tokenizer and begin at a multiple of 4 bytes.
// Returns NULL, or what is wrong with them.
const char *tokenizer_open(Tokenizer *t, const void *tables, size_t size);

// How many ids a text of n bytes may have: one a byte, or more where it becomes NFC, which may be
// longer.
size_t tokenizer_most_ids(const Tokenizer *t, size_t n);

// The ids of text[0 .. n), any bytes, into ids[], which has room for tokenizer_most_ids. With
// plain_specials the special tokens' names are read as ordinary text. Returns the number of ids, or
// -1 if there was no memory (about 20 n bytes for a word of n bytes, when n > 128; 35 n for a text
// in which something is to become NFC).
ptrdiff_t tokenizer_encode(Tokenizer *t, const char *text, size_t n, bool plain_specials,
                           uint32_t *ids);

void tokenizer_close(Tokenizer *t);

// What a token stands for: *n bytes, not ended by NUL, not always whole characters. An id beyond
// the vocabulary stands for nothing.
const char *tokenizer_text(const Tokenizer *t, uint32_t id, size_t *n);

// Special tokens are no part of a text: whoever decodes skips them.
bool tokenizer_is_special(const Tokenizer *t, uint32_t id);

// The added token with exactly this content, or TOKENIZER_NONE.
uint32_t tokenizer_find_added(const Tokenizer *t, const char *content);

// The length in bytes of the UTF-8 character at text[0 .. n), n > 0; *code is its code point. Bytes
// that are not UTF-8 (overlong forms and surrogates too) come one at a time, with UINT32_MAX in
// *code.
size_t utf8_char(const char *text, size_t n, uint32_t *code);

// A code point as UTF-8, at out, which has room for 4 bytes. Returns how many it takes.
size_t utf8_put(char *out, uint32_t code);

// What the pattern tells apart: 0 others, 1 letters, 2 numbers, 3 white space. *next is the first
// code point behind this one where a run of another class begins.
int unicode_class(uint32_t code, uint32_t *next);

// How many bytes at the end of text[0 .. n) are the beginning of a character whose rest may still
// come: 0 to 3. A stream of tokens is shown up to there and no further.
size_t utf8_unfinished(const char *text, size_t n);

#endif
