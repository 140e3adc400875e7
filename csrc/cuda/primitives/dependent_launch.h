// Programmatic dependent launch: a grid launched as `dependent` may start while its predecessor still runs.
// Below sm_90 both are nothing: there the launch waits for the predecessor.
#pragma once

#include "platform.h"

namespace rnnfast::gpu {

// Returns when the grid before this one has ended and what it wrote can be read. Before it, a kernel may touch nothing
// that its predecessor writes, and write nothing that it reads.
RNNFAST_DEVICE void wait_for_previous_grid(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "wait_for_previous_grid")) return;
  emulator::wait_for_previous_grid(site);
#elif RNNFAST_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next grid may start once every block of this one has called this or ended. Orders nothing.
RNNFAST_DEVICE void allow_next_grid(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "allow_next_grid")) return;
  emulator::allow_next_grid(site);
#elif RNNFAST_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace rnnfast::gpu
