/* Makes a process see a CPU with AVX2 and nothing newer for integers: no AVX-512, VNNI, BF16 or AMX.
 *
 * Loaded by LD_PRELOAD. Linux can make CPUID fault (arch_prctl(ARCH_CPUID, 0), where /proc/cpuinfo says cpuid_fault); the
 * handler answers it from the real CPU without those features. Libraries then take the kernels that they take on such a
 * CPU: the real ones, at their real speed.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID 0x1012

static struct sigaction before;

static int allow_cpuid(long allowed) { return syscall(SYS_arch_prctl, ARCH_CPUID, allowed); }

static void answer(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) { /* r: EAX, EBX, ECX, EDX */
    allow_cpuid(1);
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
    allow_cpuid(0);
    if (leaf == 7 && subleaf == 0) {
        r[0] = 0;                    /* no further sub-leaves: AVX-VNNI, AVX512-BF16 and what came later */
        r[1] &= ~0xdc230000u;        /* AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL */
        r[2] &= ~0x00005842u;        /* AVX512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        r[3] &= ~0x03c0010cu;        /* AVX512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX BF16, TILE, INT8 */
    } else if (leaf == 7 || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        memset(r, 0, 4 * sizeof *r); /* AMX's and AVX10's own leaves */
    } else if (leaf == 0xd && subleaf == 0) {
        r[0] &= 7;                   /* states of x87, SSE and AVX */
    }
}

static void on_fault(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    if (info->si_code != SI_KERNEL || at[0] != 0x0f || at[1] != 0xa2) { /* another fault: as if this were not here */
        sigaction(signal, &before, NULL);
        return;
    }
    uint32_t r[4];
    answer(registers[REG_RAX], registers[REG_RCX], r);
    registers[REG_RAX] = r[0];
    registers[REG_RBX] = r[1];
    registers[REG_RCX] = r[2];
    registers[REG_RDX] = r[3];
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, &before);
    if (allow_cpuid(0))
        perror("CPUID cannot be made to fault");
}
