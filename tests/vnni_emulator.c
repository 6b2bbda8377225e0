// Lets AVX-VNNI's `vpdpwssd ymm, ymm, ymm` run on an x86-64 Linux CPU that lacks it: the CPU reports an illegal
// instruction, and this computes what Intel's manual says of it. For tests only: about a microsecond each.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

static struct sigaction before;
long vnni_count;  // instructions emulated

// Register `number` of the interrupted code: its low half is in the legacy area, its high half in XSAVE's AVX area.
static void registers(ucontext_t* context, int number, int32_t* lanes, int write) {
  uint8_t* area = (uint8_t*)context->uc_mcontext.fpregs;
  uint8_t *low = area + 160 + 16 * number, *high = area + 576 + 16 * number;
  uint64_t state;
  memcpy(&state, area + 512, 8);
  if (write) {
    if (!(state & 4)) memset(area + 576, 0, 256);
    state |= 4;
    memcpy(area + 512, &state, 8);
    memcpy(low, lanes, 16);
    memcpy(high, lanes + 4, 16);
  } else {
    memcpy(lanes, low, 16);
    memcpy(lanes + 4, high, 16);
    if (!(state & 4)) memset(lanes + 4, 0, 16);
  }
}

static void on_illegal(int number, siginfo_t* info, void* data) {
  ucontext_t* context = data;
  greg_t* ip = &context->uc_mcontext.gregs[REG_RIP];
  const uint8_t* code = (const uint8_t*)*ip;
  // VEX.256.66.0F38.W0 52 /r between registers; R, B and vvvv are stored inverted.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x52 || code[4] >> 6 != 3) {
    sigaction(SIGILL, &before, 0);  // the instruction runs again and ends the process
    return;
  }
  const int to = (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8), second = (code[4] & 7) | (code[1] & 0x20 ? 0 : 8);
  int32_t sum[8], a[8], b[8];
  registers(context, to, sum, 0);
  registers(context, ~code[2] >> 3 & 15, a, 0);
  registers(context, second, b, 0);
  for (int lane = 0; lane < 8; ++lane) {
    const uint32_t low = (uint32_t)((int16_t)a[lane] * (int16_t)b[lane]);
    const uint32_t high = (uint32_t)((a[lane] >> 16) * (b[lane] >> 16));
    sum[lane] = (int32_t)((uint32_t)sum[lane] + low + high);
  }
  registers(context, to, sum, 1);
  *ip += 5;
  ++vnni_count;
  (void)number;
  (void)info;
}

int vnni_start(void) {
  struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
  return sigaction(SIGILL, &action, &before);
}
int vnni_stop(void) { return sigaction(SIGILL, &before, 0); }
