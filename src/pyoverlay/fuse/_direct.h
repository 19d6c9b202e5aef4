/* Requests answered by one plain Python call each; used by _wire.c alone, with the GIL held.
 *
 * A function gets the fields of its request and returns what the reply says; a negative number is an errno, NotImplemented says that the
 * answer has to wait for something, and so is pyfuse3's to give. direct.py says what each gets and returns.
 */
#ifndef PYOVERLAY_DIRECT_H
#define PYOVERLAY_DIRECT_H

#include <Python.h>

#include "_lane.h"

enum direct_outcome {
	DIRECT_NOT_AT_ONCE,                  /* not answered */
	DIRECT_ANSWERED,
	DIRECT_READY,                        /* of a READ, WRITE or SETATTR: the lane has a descriptor now */
	DIRECT_SYNC,                         /* of an FSYNC: *fd, ours to close, is to be synced */
};

/* A dict of functions by opcode, or NULL. -1 with an exception set. */
int direct_set(PyObject *wanted);
bool direct_has(uint32_t opcode);
uint64_t direct_answered(void);
enum direct_outcome direct_answer(int device, const struct request *r, int *fd);

#endif
