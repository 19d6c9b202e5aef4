/* Requests that need no decision, answered between registered descriptors; used by _wire.c alone and free of Python.
 *
 * The receiver holds the lane's lock from the look-up of a descriptor to the end of its use. Who clears a node's descriptors therefore waits
 * for a read or write that uses them, and may close them as soon as the call returns. Work that is queued for a thread owns duplicates.
 */
#ifndef PYOVERLAY_LANE_H
#define PYOVERLAY_LANE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>

#include "_protocol.h"

enum { ZEROED = 256 };                       /* bytes behind a request: a name that lost its NUL ends there */

/* A request as it was read: its header and body lie at mem, size bytes; the buffer holds capacity, and the zeros. */
struct request {
	char *mem;
	size_t size, capacity;
};

static inline char *new_buffer(size_t capacity) { return malloc(capacity + ZEROED); }

static inline const struct in_header *header_of(const struct request *r) { return (const struct in_header *)(const void *)r->mem; }
static inline char *body_of(const struct request *r) { return r->mem + sizeof(struct in_header); }
static inline size_t body_size(const struct request *r) { return r->size - sizeof(struct in_header); }

struct lane_counts {
	uint64_t reads, writes, xattrs, isattys, attributes;     /* answered by the receiver itself */
	uint64_t queued_reads, queued_writes;
};

double monotonic_us(void);
void reply_to(int device, uint64_t unique, int error, const void *body, size_t size);

void lane_lock(void);
bool lane_try_lock(void);
void lane_unlock(void);

enum { LANE_NO_ATTRIBUTES = -1, LANE_LINKS_AS_COUNTED = 0 };
enum { LANE_WAITS_FOR_ANYTHING, LANE_WAITS_FOR_DISK, LANE_WAITS_FOR_NOTHING };

/* With the lock held. 0 or -ENOMEM. A descriptor of -1 is none; node 0 is no node. links: with LANE_NO_ATTRIBUTES GETATTR and SETATTR are
 * Python's; else what fstat says of read_fd, but for the number, is what the node shows, with so many links, and changing it through
 * write_fd is all there is to changing it. waits: what reading its data may wait for. server: 0, or who has to be asked for them and may not
 * answer: it has threads of its own. */
int lane_set(uint64_t node, int read_fd, int write_fd, int links, int waits, unsigned server);
int lane_set_no_xattr(uint64_t node, bool absent, bool lists_nothing);
bool lane_take_written(uint64_t node);       /* 0: any node */
void lane_clear(void);
size_t lane_nodes(void);
struct lane_counts lane_counts(void);

/* Takes the lock itself. True if the request is answered, or will be; r->mem is another buffer if its own went with it. */
bool lane_answer(int device, struct request *r);

/* Who is told of each node of which a dirty page could not be written, on whatever thread; NULL: nobody. */
void lane_tell_of_failure(void (*tell)(uint64_t node));
void lane_failed(const char *mem);

/* fsync or fdatasync of fd, which is closed afterwards, by a thread where there is one; the reply comes from there. */
void lane_sync(int device, const struct request *r, int fd);

/* What stat(2) said, in the kernel's layout (_attributes.c). Then what a node shows of it: its number, and so many links unless as counted. */
void attributes_of(const struct stat *st, struct attr *out);
void attributes_shown(struct attr *attr, uint64_t node, int64_t links);

/* GETATTR and SETATTR of a node that has its attributes, by a descriptor (_attributes.c). False: it takes a decision, and so Python. */
bool answer_getattr(int device, const struct request *r, int fd, int links);
bool answer_setattr(int device, const struct request *r, int fd, int links);

#endif
