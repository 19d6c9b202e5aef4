/* Receiving: the wait for requests, and all that is answered without pyfuse3; used by _wire.c, and for the device by _notify.c.
 *
 * One thread receives. Its request, its spin and its counts are its own, and it has no GIL while it waits; another thread that asks for a count
 * may get one that is one behind, nothing else.
 */
#ifndef PYOVERLAY_RECEIVE_H
#define PYOVERLAY_RECEIVE_H

#include <Python.h>

#include <sys/types.h>

#include "_lane.h"

/* With the GIL, which it releases. The size of a request that is for pyfuse3, 0 when the mount is gone, -EINTR when it is the loop's turn, else
 * another -errno. */
ssize_t receive(int device);
/* The request, until the next call of receive(). */
const struct request *received(void);
/* From now on a request may be a WRITE of so many bytes. */
void receive_writes_of(size_t most);
/* No descriptor number outlives the session. */
void receive_no_more(void);

int receiving_device(void);                  /* -1: nothing is mounted */
bool receives(void);                         /* has it been called in this session? */
bool received_nothing(void);                 /* the last time, for as long as it was worth waiting */
uint64_t received_of(uint32_t opcode);       /* those past the last opcode count as 0 */
void receive_beside(int change);             /* so many more calls, or fewer, are waited for by the loop */

#endif
