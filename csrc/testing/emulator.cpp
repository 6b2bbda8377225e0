// The emulator behind emulator.h: fibers, barriers, warp operations, and the checks of every access.
// Compiled without -fsanitize=thread: kernels report here.
#include "testing/emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "testing/control.h"

namespace emulator {

Thread* current = nullptr;

static constexpr int MAX_THREADS = 1024;
static constexpr size_t STACK = 64 << 10, SHARED = 227 << 10;

// ---- fibers ------------------------------------------------------------------------------------------

enum State { READY, AT_BARRIER, IN_WARP, IN_GROUP, AT_NAMED, AT_COUNTING, DONE };

// An asynchronous copy that its thread has not waited for.
struct Copy {
  unsigned char* to;
  unsigned char data[16];
  unsigned group;
};

// A tensor copy from shared memory, and a product of a warpgroup, that their thread has not waited for.
struct Store {
  size_t reading;
  unsigned group;
};
struct Product {
  size_t reading;
  unsigned group;
  float* d;
  const uint32_t* left;  // in registers, or null
};

struct Fiber {
  Thread thread;
  std::vector<Copy> copies;
  std::vector<Store> stores;
  std::vector<Product> products;
  std::map<float*, std::vector<float>> results;  // of products under way, by where they will be
  unsigned group, store_group, product_group;  // those that are not committed yet
  uint16_t fences;  // between proxies, so far
  bool fenced;  // wgmma's fence, since the accumulators were last touched
  const void* barrier;
  State state;
  const void* where;  // it waits
  int line;
  uint64_t value;  // of a warp operation: brought, then got
  int from;
  unsigned mask;
#if defined(__x86_64__)
  void* stack;
#else
  ucontext_t context;
#endif
};

static Fiber fibers[MAX_THREADS];
static int threads = 0, me = 0;
static char* stacks = nullptr;
static unsigned char* shared = nullptr;
static size_t shared_bytes = 0;
static const std::function<void()>* kernel_body = nullptr;
static bool backwards = false;
static bool exact = false;  // shared memory's accesses are compared by vector clocks (hopper.inc)

#if defined(__x86_64__)
// Saves the callee's registers on the stack, exchanges the stacks, and returns on the other one.
extern "C" void gpt2fast_emulator_switch(void** save, void* load);
asm(R"(.text
.hidden gpt2fast_emulator_switch
.globl gpt2fast_emulator_switch
gpt2fast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static void* scheduler_stack;
static void to_scheduler() { gpt2fast_emulator_switch(&fibers[me].stack, scheduler_stack); }
static void to_fiber(int i) { gpt2fast_emulator_switch(&scheduler_stack, fibers[i].stack); }
#else
static ucontext_t scheduler_context;
static void to_scheduler() { swapcontext(&fibers[me].context, &scheduler_context); }
static void to_fiber(int i) { swapcontext(&scheduler_context, &fibers[i].context); }
#endif

static void end_of_thread();

static void fiber_main() {
  (*kernel_body)();
  end_of_thread();
  fibers[me].state = DONE;
  to_scheduler();
  abort();
}

static void prepare(int i) {
  Fiber& f = fibers[i];
  f.copies.clear();
  f.stores.clear();
  f.products.clear();
  f.results.clear();
  f.group = f.store_group = f.product_group = f.fences = 0;
  f.fenced = false;
  char* stack = stacks + i * STACK;
#if defined(__x86_64__)
  uint64_t* top = (uint64_t*)(stack + STACK - 64);
  *--top = 0;  // keeps the stack as the calling convention wants it
  *--top = (uint64_t)&fiber_main;
  for (int k = 0; k < 6; ++k) *--top = 0;
  fibers[i].stack = top;
#else
  getcontext(&fibers[i].context);
  fibers[i].context.uc_stack.ss_sp = stack;
  fibers[i].context.uc_stack.ss_size = STACK;
  makecontext(&fibers[i].context, fiber_main, 0);
#endif
}

// ---- complaints --------------------------------------------------------------------------------------

static std::vector<std::string> complaints;
static std::string running;  // the kernel's name

static std::string source_line(const void* where) {
  static std::map<const void*, std::string> known;
  const auto before = known.find(where);
  if (before != known.end()) return before->second;
  Dl_info found;
  if (!where || !dladdr(where, &found) || !found.dli_fname) return "?";
  char command[1024], line[512] = "";
  snprintf(command, sizeof command, "addr2line -s -e '%s' %#zx 2>/dev/null", found.dli_fname,
           size_t((const char*)where - 1 - (const char*)found.dli_fbase));
  if (FILE* pipe = popen(command, "r")) {
    if (!fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  std::string text(line);
  text = text.substr(0, text.find_first_of(" \n"));
  return known[where] = text.empty() || text[0] == '?' ? std::string(found.dli_fname) : text;
}

static void complain(const std::string& what, const void* where) {
  if (complaints.size() >= 8) return;
  std::string text = what + " at " + source_line(where);
  if (current)
    text += ", block " + std::to_string(current->block_index.x) + "," + std::to_string(current->block_index.y) +
            " thread " + std::to_string(me);
  if (complaints.empty() || complaints.back() != text) complaints.push_back(text);
}

// ---- memory ------------------------------------------------------------------------------------------

static void* lazy_memory(size_t bytes) {
  void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) throw std::bad_alloc();
  return made;
}

// Who touched an element last. Phases number the stretches between block barriers, over all blocks; steps
// those between a warp's barriers within a phase. A reader may stand for SEVERAL of its warp, or of several
// warps where its step is NEVER; OTHER_BLOCK: one read it too. IN_FLIGHT: the writer copies it asynchronously.
struct Touch {
  uint32_t write_phase, read_phase;
  uint16_t writer, write_step, reader, read_step;
  uint16_t slot, write_fence;  // whose clock tells of the write; how many fences between proxies it had passed
  uint32_t write_epoch;
};
static constexpr uint16_t SEVERAL = 0x8000, ATOMIC = 0x4000, OTHER_BLOCK = 0x2000, IN_FLIGHT = 0x1000;
static constexpr uint16_t NEVER = 0xffff;  // a step that no barrier of the warp ends

// Zeros that take no memory until they are touched: tensors may span gigabytes of which few bytes exist.
class Touches {
 public:
  Touches() = default;
  Touches(Touches&& other) : all_(other.all_), bytes_(other.bytes_) { other.bytes_ = 0; }
  ~Touches() { reset(0); }
  void reset(size_t count) {
    if (bytes_) munmap(all_, bytes_);
    bytes_ = count * sizeof(Touch);
    if (bytes_) all_ = (Touch*)lazy_memory(bytes_);
  }
  Touch& operator[](size_t i) { return all_[i]; }

 private:
  Touch* all_ = nullptr;
  size_t bytes_ = 0;
};

struct Region {
  uintptr_t begin = 0, end = 0;
  size_t element = 1;
  Touches touches;
};

static std::vector<Region> tensors;
static Region shared_region;
static uint32_t phase = 1, first_phase = 1;  // first_phase: of this block
static std::vector<uint16_t> steps(MAX_THREADS / 32);

static void touch_exactly(size_t element, bool write, const void* caller);
static void note_writer(Touch& t);

static bool before_now(uint32_t then, uint16_t thread, uint16_t step, bool any_of_warp) {
  if (then == 0) return true;
  if (then < first_phase) return false;  // another block
  if (then < phase) return true;
  const int other = thread & 0x3ff;
  if (other == me && !any_of_warp) return true;
  return other / 32 == me / 32 && step < steps[me / 32];
}

static void touch(Region& region, uintptr_t place, size_t bytes, bool write, bool atomic, const void* caller) {
  const bool in_shared = &region == &shared_region;
  const size_t last = (place + bytes - 1 - region.begin) / region.element;
  for (size_t i = (place - region.begin) / region.element; i <= last; ++i) {
    if (in_shared && exact) {
      touch_exactly(i, write, caller);
      continue;
    }
    Touch& t = region.touches[i];
    // Most reads find what an earlier one of this phase was checked for, and leave the same trace.
    if (!write && t.read_phase == phase && t.read_step == NEVER && t.write_phase != phase) continue;
    if (in_shared && t.write_phase < first_phase) {
      if (!write) complain("read of shared memory that was not written, byte " + std::to_string(i * region.element), caller);
      if (t.read_phase < first_phase) t.read_phase = t.reader = 0;
      t.write_phase = 0;
    }
    if (t.write_phase && t.writer & IN_FLIGHT)
      complain(std::string(write ? "write" : "read") + " of what thread " + std::to_string(t.writer & 0x3ff) +
                   " copies asynchronously and has not waited for",
               caller);
    const bool both_atomic = atomic && (t.writer & ATOMIC);
    if (!both_atomic && !before_now(t.write_phase, t.writer, t.write_step, false))
      complain(std::string("race: ") + (write ? "write" : "read") + " of what thread " +
                   std::to_string(t.writer & 0x3ff) + " wrote with no barrier between" +
                   (t.write_phase < first_phase ? " (in another block)" : ""),
               caller);
    if (write && !both_atomic &&
        (t.reader & OTHER_BLOCK || !before_now(t.read_phase, t.reader, t.read_step, t.reader & SEVERAL)))
      complain("race: write of what thread " + std::to_string(t.reader & 0x3ff) + " reads with no barrier between" +
                   (t.read_phase < first_phase ? " (in another block)" : ""),
               caller);
    const uint16_t step = steps[me / 32];
    if (write) {
      t.write_phase = phase;
      t.writer = uint16_t(me | (atomic ? ATOMIC : 0));
      t.write_step = step;
      note_writer(t);
    } else {
      const int other = t.reader & 0x3ff;
      if (t.read_phase != phase) {
        const bool outside = t.reader & OTHER_BLOCK || (t.read_phase && t.read_phase < first_phase);
        t.reader = uint16_t(me | (outside && !in_shared ? OTHER_BLOCK : 0));
        t.read_step = step;
      } else if (other / 32 != me / 32 || t.read_step == NEVER) {
        t.reader |= SEVERAL;
        t.read_step = NEVER;
      } else if (t.read_step != step) {  // what the warp read before its barrier is past
        t.reader = uint16_t(me | (t.reader & OTHER_BLOCK));
        t.read_step = step;
      } else if (other != me) {
        t.reader |= SEVERAL;
      }
      t.read_phase = phase;
    }
  }
}

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;

static void check(const void* pointer, size_t bytes, bool write, bool atomic, const void* caller) {
  if (!current || bytes == 0) return;
  const uintptr_t place = (uintptr_t)pointer, end = place + bytes;
  if (place >= (uintptr_t)stacks && end <= (uintptr_t)stacks + MAX_THREADS * STACK) {
    for (const auto& [d, values] : fibers[me].results)
      if (place >= (uintptr_t)d && place < (uintptr_t)(d + values.size()))
        complain("accumulators touched before their product was waited for", caller);
    for (const Product& p : fibers[me].products)
      if (write && p.left && place >= (uintptr_t)p.left && place < (uintptr_t)(p.left + 4))
        complain("left operand written before its product was waited for", caller);
    return;
  }
  if (bytes <= 16 && place % bytes) complain("misaligned access of " + std::to_string(bytes) + " bytes", caller);
  if (place >= shared_region.begin && place < shared_region.begin + SHARED) {
    if (end > shared_region.end)
      complain("access beyond the " + std::to_string(shared_bytes) + " bytes of shared memory", caller);
    else
      touch(shared_region, place, bytes, write, atomic, caller);
    return;
  }
  for (Region& region : tensors)
    if (place >= region.begin && place < region.end) {
      if (end > region.end)
        complain("access beyond the end of a tensor", caller);
      else
        touch(region, place, bytes, write, atomic, caller);
      return;
    }
  if (!write) {  // a kernel's arguments are on the host's stack, constants in this library
    const uintptr_t host = (uintptr_t)kernel_body;
    if (place > host - (1 << 16) && place < host + (1 << 16)) return;
    if (place >= (uintptr_t)&__ehdr_start && place < (uintptr_t)&_end) return;
  }
  complain(std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes outside of every tensor", caller);
  to_scheduler();  // never comes back: the access itself could end the process
}

void access(const void* place, size_t bytes, bool write, const void* caller) {
  check(place, bytes, write, false, caller);
}
void atomic_access(const void* place, size_t bytes, const void* caller) { check(place, bytes, true, true, caller); }

void* shared_memory() { return shared; }

// ---- barriers and warp operations --------------------------------------------------------------------

void block_barrier(int line, const void* caller) {
  fibers[me].state = AT_BARRIER;
  fibers[me].line = line;
  fibers[me].where = caller;
  to_scheduler();
}

int lane() { return me % 32; }

static bool complete_warp(int first, unsigned mask) {
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      const int t = first + i;
      if (t >= threads || fibers[t].state != IN_WARP || fibers[t].mask != mask || fibers[t].line != fibers[me].line)
        return false;
    }
  return true;
}

// Waits until every lane of the mask has come. True for the last one, which does what they came for.
static bool last_of_warp(unsigned mask, uint64_t brought, int line, const void* caller) {
  Fiber& mine = fibers[me];
  mine.value = brought;
  mine.mask = mask;
  mine.line = line;
  mine.where = caller;
  mine.state = IN_WARP;
  if (!(mask >> (me % 32) & 1)) complain("warp operation by a lane outside of its mask", caller);
  if (complete_warp(me / 32 * 32, mask)) return true;
  to_scheduler();
  return false;
}

uint64_t exchange(unsigned mask, uint64_t value, int from, int line, const void* caller) {
  Fiber& mine = fibers[me];
  const int first = me / 32 * 32;
  mine.from = from;
  if (!last_of_warp(mask, value, line, caller)) return mine.value;
  uint64_t brought[32];
  for (int i = 0; i < 32; ++i) brought[i] = first + i < threads ? fibers[first + i].value : 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      const int source = fibers[first + i].from & 31;
      if (!(mask >> source & 1)) complain("shuffle from a lane outside of the mask", caller);
      fibers[first + i].value = brought[source];
      fibers[first + i].state = READY;
    }
  return mine.value;
}

static void join_lanes(unsigned mask);

void warp_barrier(unsigned mask, int line, const void* caller) {
  exchange(mask, 0, me % 32, line, caller);
  // Every lane comes through here after the exchange; the first one counts.
  static std::vector<int> passed(MAX_THREADS / 32);
  int lanes = 0;
  for (int i = 0; i < 32; ++i) lanes += mask >> i & 1;
  if (passed[me / 32]++ == 0) {
    ++steps[me / 32];
    if (exact) join_lanes(mask);
  }
  if (passed[me / 32] == lanes) passed[me / 32] = 0;
}

// ---- matrix fragments and asynchronous copies ---------------------------------------------------------

// `combine(brought by lane 0, ... by lane 31)`, once for the whole warp.
template <class Brought, class Combine>
static void whole_warp(Brought& mine, int line, const void* caller, const Combine& combine) {
  if (!last_of_warp(0xffffffffu, (uint64_t)&mine, line, caller)) return;
  Fiber* const lanes = fibers + me / 32 * 32;
  Brought* brought[32];
  for (int i = 0; i < 32; ++i) {
    brought[i] = (Brought*)lanes[i].value;
    lanes[i].state = READY;
  }
  combine(brought);
}

static float widened(uint32_t pair, int half, bool is_bf16) {
  const uint16_t bits = uint16_t(pair >> (16 * half));
  if (is_bf16) return __bfloat162float({bits});
  __half x;
  __builtin_memcpy(&x, &bits, 2);
  return __half2float(x);
}

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_bf16, int line, const void* caller) {
  struct Fragments {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  whole_warp(mine, line, caller, [&](Fragments** lanes) {
    float left[16][16], right[16][8], sum[16][8];
    for (int l = 0; l < 32; ++l)
      for (int half = 0; half < 2; ++half) {
        const int group = l / 4, pair = l % 4 * 2 + half;
        for (int i = 0; i < 4; ++i) left[group + i % 2 * 8][pair + i / 2 * 8] = widened(lanes[l]->a[i], half, is_bf16);
        for (int i = 0; i < 2; ++i) right[pair + i * 8][group] = widened(lanes[l]->b[i], half, is_bf16);
        for (int i = 0; i < 2; ++i) sum[group + i * 8][pair] = lanes[l]->c[2 * i + half];
      }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) lanes[l]->c[i] = sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
}

static bool is_shared(const void* place) {
  return (uintptr_t)place >= shared_region.begin && (uintptr_t)place < shared_region.begin + SHARED;
}

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed, int line, const void* caller) {
  if (!is_shared(row)) {
    complain("matrix row outside of shared memory", caller);
    to_scheduler();
  }
  check(row, 16, false, false, caller);
  struct Row {
    const unsigned char* place;
    uint32_t* r;
  } mine{(const unsigned char*)row, r};
  whole_warp(mine, line, caller, [&](Row** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int l = 0; l < 32; ++l) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int line = transposed ? l % 4 * 2 + i : l / 4, column = transposed ? l / 4 : l % 4 * 2 + i;
          memcpy(&pair[i], lanes[matrix * 8 + line]->place + 2 * column, 2);
        }
        memcpy(&lanes[l]->r[matrix], pair, 4);
      }
  });
}

void copy_async(void* to, const void* from, int bytes, const void* caller) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) complain("misaligned asynchronous copy", caller);
  if (!is_shared(to)) {
    complain("asynchronous copy to an address outside of shared memory", caller);
    to_scheduler();
  }
  for (int i = 0; i < bytes; i += 2) check((const char*)from + i, 2, false, false, caller);
  check(to, 16, true, false, caller);  // from now on, and until it is waited for
  const size_t first = ((uintptr_t)to - shared_region.begin) / shared_region.element;
  for (size_t i = 0; i < 16 / shared_region.element; ++i) shared_region.touches[first + i].writer |= IN_FLIGHT;
  Copy copy{(unsigned char*)to, {}, fibers[me].group};
  memcpy(copy.data, from, bytes);
  fibers[me].copies.push_back(copy);
}

void copy_async_commit() { ++fibers[me].group; }

void copy_async_wait(int groups, const void* caller) {
  Fiber& mine = fibers[me];
  const auto arrived = [&](const Copy& copy) { return copy.group + groups < mine.group; };
  for (const Copy& copy : mine.copies) {
    if (!arrived(copy)) continue;
    const size_t first = ((uintptr_t)copy.to - shared_region.begin) / shared_region.element;
    for (size_t i = 0; i < 16 / shared_region.element; ++i) shared_region.touches[first + i].writer &= ~IN_FLIGHT;
    check(copy.to, 16, true, false, caller);
    memcpy(copy.to, copy.data, 16);
  }
  mine.copies.erase(std::remove_if(mine.copies.begin(), mine.copies.end(), arrived), mine.copies.end());
}

#include "testing/hopper.inc"

// Returns false where the block cannot go on.
static bool release_barrier() {
  int waiting = 0, done = 0, line = 0;
  const void* where = nullptr;
  bool apart = false;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == DONE) ++done;
    if (f.state == AT_BARRIER) {
      apart = apart || (where && line != f.line);
      line = f.line;
      where = f.where;
      ++waiting;
    }
  }
  if (done == threads) return false;
  const bool all = waiting == threads;
  if (!all || apart) {
    const Fiber* stuck = nullptr;
    for (int i = 0; i < threads; ++i)  // the most telling one: other threads wait for it at what comes later
      if (fibers[i].state != DONE && fibers[i].state != AT_BARRIER && (!stuck || fibers[i].state < stuck->state))
        stuck = &fibers[i];
    if (stuck)
      complain(stuck->state == IN_WARP       ? "warp operation that not all lanes of its mask reach"
               : stuck->state == IN_GROUP    ? "product that not all threads of its warpgroup reach"
               : stuck->state == AT_NAMED    ? "named barrier that too few threads reach"
                                             : "deadlock: a thread waits for a barrier's phase that does not end",
               stuck->where);
    else if (apart)
      complain("threads of a block wait at different barriers", where);
    else
      complain("barrier reached by " + std::to_string(waiting) + " of " + std::to_string(threads) + " threads", where);
    return false;
  }
  for (int i = 0; i < threads; ++i) fibers[i].state = READY;
  for (uint16_t& step : steps) step = 0;
  ++phase;
  if (exact) join_all();
  return true;
}

// When no thread can run. Returns false where the block cannot go on.
static bool advance() {
  if (transfers.empty()) return release_barrier();
  if (!complaints.empty()) return false;
  if (std::all_of(fibers, fibers + threads, [](const Fiber& f) { return f.state == DONE; })) {
    complain("block that ends before a copy has arrived", nullptr);
    return false;
  }
  deliver();
  return true;
}

// ---- a grid ------------------------------------------------------------------------------------------

static std::vector<Launch> recorded;
static bool record_only = false;

static std::string symbol_of(const void* kernel) {
  Dl_info found;
  return dladdr(kernel, &found) && found.dli_sname ? found.dli_sname : "?";
}

static void run_block() {
  if (shared_bytes) memset(shared, 0xff, shared_bytes);  // NaN
  first_phase = ++phase;
  exact = false;
  readings.clear();
  barriers.clear();
  transfers.clear();
  std::fill(epochs.begin(), epochs.end(), 0);
  for (uint16_t& step : steps) step = 0;
  for (int i = 0; i < threads; ++i) {
    fibers[i].state = READY;
    prepare(i);
  }
  do {
    for (bool moved = true; moved;) {
      moved = false;
      for (int k = 0; k < threads; ++k) {
        me = backwards ? threads - 1 - k : k;
        if (fibers[me].state != READY) continue;
        current = &fibers[me].thread;
        to_fiber(me);
        current = nullptr;
        moved = true;
        if (fibers[me].state == READY && !complaints.empty()) return;
      }
    }
  } while (advance());
}

void run(const char* op, const void* kernel, dim3 grid, int block, size_t bytes,
         const std::function<void()>& body) {
  if (record_only) {
    recorded.push_back({symbol_of(kernel), op, grid, block, bytes});
    return;
  }
  const std::string refused = std::string("gpt2fast CUDA kernel ") + op + ": ";
  if (block < 1 || block > MAX_THREADS || grid.y > 65535 || grid.z > 65535 || bytes > SHARED)
    throw std::runtime_error(refused + "invalid configuration");
  if (!stacks) {
    stacks = (char*)lazy_memory(MAX_THREADS * STACK);
    shared = (unsigned char*)lazy_memory(SHARED + 4096);  // whole pages: a multiple of 1024 bytes
    shared_region.element = 2;
    shared_region.begin = (uintptr_t)shared;
    shared_region.touches.reset(SHARED / 2);
  }
  // Launches follow each other, so nothing races with an earlier one.
  for (Region& region : tensors) region.touches.reset((region.end - region.begin) / region.element + 1);
  shared_region.end = shared_region.begin + bytes;
  shared_bytes = bytes;
  threads = block;
  kernel_body = &body;
  complaints.clear();
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && complaints.empty(); ++x) {
        for (int i = 0; i < block; ++i)
          fibers[i].thread = {{unsigned(i), 0, 0}, {x, y, z}, dim3(unsigned(block)), grid};
        run_block();
      }
  if (complaints.empty()) return;
  int status;
  char* plain = abi::__cxa_demangle(symbol_of(kernel).c_str(), nullptr, nullptr, &status);
  std::string text = refused + (plain ? plain : "");
  free(plain);
  for (const std::string& complaint : complaints) text += "\n  " + complaint;
  throw std::runtime_error(text);
}

void know(const std::vector<Tensor>& given) {
  tensors.clear();
  std::vector<Tensor> sorted = given;
  std::sort(sorted.begin(), sorted.end(), [](const Tensor& a, const Tensor& b) { return a.address < b.address; });
  for (const Tensor& t : sorted) {
    if (t.bytes == 0) continue;
    if (!tensors.empty() && t.address < tensors.back().end) {  // the same memory under two names
      tensors.back().end = std::max(tensors.back().end, t.address + t.bytes);
      tensors.back().element = std::min(tensors.back().element, t.element);
    } else {
      tensors.emplace_back();
      tensors.back().begin = t.address;
      tensors.back().end = t.address + t.bytes;
      tensors.back().element = t.element;
    }
  }
}

void options(bool records, bool reversed) {
  record_only = records;
  backwards = reversed;
}

std::vector<Launch> launches() {
  std::vector<Launch> taken;
  taken.swap(recorded);
  return taken;
}

}  // namespace emulator

// ---- what the compiler calls in kernels ----------------------------------------------------------------

#define HERE __builtin_return_address(0)
#define ACCESS(size)                                                                                    \
  extern "C" void __tsan_read##size(void* p) { emulator::access(p, size, false, HERE); }                \
  extern "C" void __tsan_write##size(void* p) { emulator::access(p, size, true, HERE); }                \
  extern "C" void __tsan_unaligned_read##size(void* p) { emulator::access(p, size, false, HERE); }      \
  extern "C" void __tsan_unaligned_write##size(void* p) { emulator::access(p, size, true, HERE); }      \
  extern "C" void __tsan_volatile_read##size(void* p) { emulator::access(p, size, false, HERE); }       \
  extern "C" void __tsan_volatile_write##size(void* p) { emulator::access(p, size, true, HERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t n) { emulator::access(p, n, false, HERE); }
extern "C" void __tsan_write_range(void* p, size_t n) { emulator::access(p, n, true, HERE); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
