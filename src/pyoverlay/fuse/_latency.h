/* Processors kept awake while clients are at work, through /dev/cpu_dma_latency; used by the receiver alone.
 *
 * A client sleeps while its request is served. On a machine without another thing to do its processor goes to sleep too, and waking that one
 * up for the reply can take longer than the whole request: 15 of 17 µs of a stat were that, on a virtual machine. The kernel takes such
 * requests from whoever may open the device, for as long as it is open (Documentation/power/pm_qos_interface.rst): an idle processor then
 * polls.
 */
#ifndef PYOVERLAY_LATENCY_H
#define PYOVERLAY_LATENCY_H

void latency_set(int fd);                    /* -1: none */
void latency_busy(void);                     /* a request came */
void latency_idle(void);                     /* none came for a while */

#endif
