// Comes before everything else (-include) in kl3m.c and tokenizer.c when they are fuzzed: what they
// ask of the system goes through fuzz.c, which counts what is allocated, gives standard input,
// keeps what is written, and goes on where the program would end.
#ifndef SYSTEM_H
#define SYSTEM_H
#define _GNU_SOURCE
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void *fuzz_malloc(size_t n);
void *fuzz_calloc(size_t n, size_t size);
void *fuzz_aligned_alloc(size_t alignment, size_t n);
void *fuzz_realloc(void *memory, size_t n);
void fuzz_free(void *memory);
int fuzz_vasprintf(char **text, const char *format, va_list arguments);
void *fuzz_mmap(void *at, size_t n, int rights, int flags, int fd, off_t offset);
int fuzz_munmap(void *memory, size_t n);
ssize_t fuzz_read(int fd, void *data, size_t n);
ssize_t fuzz_write(int fd, const void *data, size_t n);
int fuzz_poll(struct pollfd *fds, nfds_t n, int timeout);
int fuzz_isatty(int fd);
__attribute__((noreturn)) void fuzz_exit(int status);

#define malloc fuzz_malloc
#define calloc fuzz_calloc
#define aligned_alloc fuzz_aligned_alloc
#define realloc fuzz_realloc
#define free fuzz_free
#define vasprintf fuzz_vasprintf
#define mmap fuzz_mmap
#define munmap fuzz_munmap
#define read fuzz_read
#define write fuzz_write
#define poll fuzz_poll
#define isatty fuzz_isatty
#define exit fuzz_exit
#define _exit fuzz_exit
#endif
