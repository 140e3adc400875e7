// Asynchronous copies and stores: each runs once, some time after it was issued, in a TSan context of its own.
#include "internal.h"

namespace rnnfast::emulator {

void issue(std::function<void()> effect, std::function<void()> completed, const void* key, bool after_issuer) {
  Fiber& me = running();
  if (me.unwinding) return;
  Quiet quiet;
  auto operation = std::make_unique<Operation>();
  operation->effect = std::move(effect);
  operation->completed = std::move(completed);
  operation->key = key;
  operation->cluster = me.block->cluster;
  operation->who = std::string(me.what) + " " + text_of(me.site) + " by " + short_name_of(me);
  if (after_issuer) {
    drain_stores();
    operation->issued = Key::make();
    operation->issued.release();
  }
  operation->start = me.block->grid->start_key;
  // What earlier grids wrote is there in any case once the thread has waited for them.
  if (me.waited_for_previous) operation->previous = me.block->grid->previous_key;
  ++me.block->cluster->operations;
  scheduler().operations.push_back(std::move(operation));
}

bool run_some_operation() {
  Scheduler& s = scheduler();
  if (s.operations.empty()) return false;
  const size_t chosen = s.shuffled ? s.random.below(s.operations.size()) : 0;
  std::unique_ptr<Operation> operation = std::move(s.operations[chosen]);
  s.operations.erase(s.operations.begin() + static_cast<std::ptrdiff_t>(chosen));
  s.operation = operation.get();
  // Errors name the thread that issued the operation.
  struct Named {
    ~Named() { scheduler().operation = nullptr; }
  } named;
  const auto run = [&] {
    operation->start.acquire();
    operation->issued.acquire();
    operation->previous.acquire();
    operation->effect();
    if (tsan_here()) __tsan_release(const_cast<void*>(operation->key));
    operation->cluster->grid->end_key.release();
  };
  if (tsan_here()) {
    constexpr unsigned kNoOrdering = 1;
    void* context = __tsan_create_fiber(0);
    __tsan_set_fiber_name(context, operation->who.c_str());
    __tsan_switch_to_fiber(context, kNoOrdering);
    std::exception_ptr error;
    try {
      run();
    } catch (...) { error = std::current_exception(); }
    __tsan_switch_to_fiber(s.host.tsan, kNoOrdering);
    __tsan_destroy_fiber(context);
    if (error) std::rethrow_exception(error);
  } else {
    run();
  }
  const NoOrdering no_ordering;
  if (operation->completed) operation->completed();
  --operation->cluster->operations;
  operation.reset();
  s.operation_ended = true;
  s.spins = 0;
  return true;
}

}  // namespace rnnfast::emulator
