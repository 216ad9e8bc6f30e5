/* See cuda_runtime.h of this folder. Fibers are switched by a few lines of assembly: x86-64 only. */
#include "cuda_runtime.h"
#include "ptx_emulated.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

dim3 emulated_thread_index, emulated_block_index, emulated_block_dim, emulated_grid_dim;

namespace {

[[noreturn]] void die(const char *what)
{
    std::fprintf(stderr, "emulator: %s (block %u,%u thread %u)\n", what, emulated_block_index.x, emulated_block_index.y, emulated_thread_index.x);
    std::abort();
}

long environment(const char *name, long otherwise)
{
    const char *s = std::getenv(name);
    return s != nullptr && s[0] != '\0' ? std::strtol(s, nullptr, 10) : otherwise;
}

/* --- fibers --- */

constexpr size_t STACK = 256 << 10;
constexpr int THREADS_MAX = 1024;

extern "C" void emulated_switch(void **save, void *to);
asm(R"(
.text
.globl emulated_switch
.type emulated_switch,@function
emulated_switch:
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
.size emulated_switch,.-emulated_switch
)");

struct copy { void *out; const void *in; int bytes; };

struct fiber {
    unsigned char *stack = nullptr;
    void *sp = nullptr;
    bool done = true;
    unsigned barriers = 0, collectives = 0;
    std::vector<copy> pending;            /* cp.async under way */
    std::deque<std::vector<copy>> groups;
};

struct warp {
    unsigned arrived = 0, tag[2] = {0, 0};
    unsigned complete = 0; /* collectives that all lanes have reached */
    emulated_lane slots[2][32];
};

struct machine {
    fiber fibers[THREADS_MAX];
    warp warps[THREADS_MAX / 32];
    void *home = nullptr;
    int self = 0, count = 0;
    unsigned barrier_arrived = 0, barriers_complete = 0;
    unsigned long progress = 0;
    std::vector<unsigned char> shared;
    const std::function<void()> *body = nullptr;
} m;

void yield()
{
    emulated_switch(&m.fibers[m.self].sp, m.home);
}

void fiber_main()
{
    (*m.body)();
    fiber &f = m.fibers[m.self];
    if (!f.pending.empty() || !f.groups.empty()) {
        for (auto &g : f.groups) {
            if (!g.empty()) {
                die("a thread ended with copies that nobody waited for");
            }
        }
        if (!f.pending.empty()) {
            die("a thread ended with copies that were not committed");
        }
    }
    f.done = true;
    m.progress++;
    yield();
    die("a finished thread was run again");
}

void fiber_start(fiber &f)
{
    if (f.stack == nullptr) {
        f.stack = (unsigned char *)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (f.stack == MAP_FAILED) {
            die("no memory for a stack");
        }
        mprotect(f.stack, 4096, PROT_NONE);
    }
    void **top = (void **)(void *)(f.stack + STACK) - 1; /* as after a call: 8 above a multiple of 16 */
    *top = nullptr;                                      /* fiber_main never returns */
    void **sp = top - 7;
    std::memset(sp, 0, 6 * sizeof *sp);
    sp[6] = (void *)fiber_main;
    f.sp = sp;
    f.done = false;
    f.barriers = f.collectives = 0;
    f.pending.clear();
    f.groups.clear();
}

std::vector<int> thread_order(int count)
{
    static const long seed = environment("SPURION_EMULATOR_ORDER", 0);
    static std::mt19937 random((unsigned)seed);
    std::vector<int> order((size_t)count);
    std::iota(order.begin(), order.end(), 0);
    if (seed == 1) {
        for (int i = 0; i < count; i++) {
            order[(size_t)i] = count - 1 - i;
        }
    } else if (seed > 1) {
        std::shuffle(order.begin(), order.end(), random);
    }
    return order;
}

void run_block(int count, size_t shared_bytes, const std::function<void()> &body)
{
    std::vector<int> order = thread_order(count);
    m.shared.assign(shared_bytes + 64, 0xff); /* NaN, -1: what shared memory holds at first means nothing */
    m.body = &body;
    m.count = count;
    m.barrier_arrived = m.barriers_complete = 0;
    for (int i = 0; i < count; i++) {
        fiber_start(m.fibers[i]);
    }
    for (int w = 0; w < count / 32; w++) {
        m.warps[w].arrived = m.warps[w].complete = 0;
    }
    for (int left = count; left > 0;) {
        unsigned long before = m.progress;
        left = 0;
        for (int t : order) {
            if (!m.fibers[t].done) {
                m.self = t;
                emulated_thread_index = dim3((unsigned)t);
                emulated_switch(&m.home, m.fibers[t].sp);
                left += !m.fibers[t].done;
            }
        }
        if (left > 0 && m.progress == before) {
            die("threads wait for each other: a barrier or collective that not all reach");
        }
    }
}

/* --- memory and streams --- */

struct allocation { unsigned char *map; size_t map_bytes, bytes; };

std::map<unsigned char *, allocation> allocations; /* by address */
std::map<const void *, int> shared_allowed;
std::deque<std::function<void()>> queue;
size_t used_bytes;
cudaError_t sticky = cudaSuccess;
unsigned long enqueued, executed;
bool open_now;

void protect(int how)
{
    for (auto &a : allocations) {
        if (mprotect(a.second.map, a.second.map_bytes - 4096, how) != 0) {
            die("mprotect");
        }
    }
    open_now = how != PROT_NONE;
}

void drain(unsigned long until)
{
    if (executed >= until || open_now) {
        return;
    }
    protect(PROT_READ | PROT_WRITE);
    while (executed < until) {
        std::function<void()> work = std::move(queue.front());
        queue.pop_front();
        executed++;
        if (sticky == cudaSuccess) {
            work();
        }
    }
    protect(PROT_NONE);
}

/* A copy from or to the host runs beside the program only where the memory is pinned; elsewhere the real library waits. */
std::map<unsigned char *, size_t> pinned;

bool is_pinned(const void *p, size_t bytes)
{
    auto found = pinned.upper_bound((unsigned char *)p);
    return found != pinned.begin() && (unsigned char *)p + bytes <= (--found)->first + found->second;
}

/* How often the program waited for a stream, for SPURION_EMULATOR_WAITS. */
void count_wait()
{
    static const char *const path = std::getenv("SPURION_EMULATOR_WAITS");
    static unsigned long waits;
    if (path != nullptr) {
        FILE *f = std::fopen(path, "w");
        if (f == nullptr || std::fprintf(f, "%lu\n", ++waits) < 0 || std::fclose(f) != 0) {
            die("SPURION_EMULATOR_WAITS");
        }
    }
}

size_t device_bytes()
{
    return (size_t)environment("SPURION_EMULATOR_MIB", 4096) << 20;
}

size_t shared_max()
{
    return (size_t)environment("SPURION_EMULATOR_SHARED_KIB", 227) << 10;
}

} // namespace

struct emulated_stream { int unused; };
struct emulated_event { unsigned long after; };

/* --- inside a kernel --- */

void emulated_check(bool ok, const char *what)
{
    if (!ok) {
        die(what);
    }
}

unsigned char *emulated_shared()
{
    return m.shared.data() + (-(uintptr_t)m.shared.data() & 63);
}

void emulated_barrier()
{
    fiber &f = m.fibers[m.self];
    int self = m.self;
    unsigned mine = ++f.barriers;
    if (++m.barrier_arrived == (unsigned)m.count) {
        m.barrier_arrived = 0;
        m.barriers_complete++;
        m.progress++;
    }
    while (m.barriers_complete < mine) {
        yield();
    }
    m.self = self;
    emulated_thread_index = dim3((unsigned)self);
}

const emulated_lane *emulated_exchange(int tag, const void *mine, size_t bytes)
{
    int self = m.self, lane = self % 32;
    warp &w = m.warps[self / 32];
    unsigned number = m.fibers[self].collectives++, side = number & 1;
    if (w.arrived % 32 == 0 && w.arrived / 32 == number) {
        w.tag[side] = (unsigned)tag;
    } else if (w.tag[side] != (unsigned)tag) {
        die("lanes of one warp stand at different instructions");
    }
    std::memset(w.slots[side][lane].bytes, 0xff, sizeof w.slots[side][lane].bytes);
    if (bytes > 0) {
        std::memcpy(w.slots[side][lane].bytes, mine, bytes);
    }
    if (++w.arrived % 32 == 0) {
        w.complete++;
        m.progress++;
    }
    while (w.complete <= number) {
        yield();
    }
    m.self = self;
    emulated_thread_index = dim3((unsigned)self);
    return w.slots[side];
}

void emulated_copy_async(void *out, const void *in, int bytes)
{
    m.fibers[m.self].pending.push_back(copy{out, in, bytes});
}

void emulated_copy_commit()
{
    fiber &f = m.fibers[m.self];
    f.groups.push_back(std::move(f.pending));
    f.pending.clear();
}

void emulated_copy_wait(int groups_left)
{
    fiber &f = m.fibers[m.self];
    while ((int)f.groups.size() > groups_left) {
        for (const copy &c : f.groups.front()) {
            if (c.in == nullptr) {
                std::memset(c.out, 0, (size_t)c.bytes);
            } else {
                std::memcpy(c.out, c.in, (size_t)c.bytes);
            }
        }
        f.groups.pop_front();
    }
}

/* --- the runtime --- */

cudaError_t emulated_enqueue(cudaStream_t s, std::function<void()> work)
{
    if (s == nullptr) {
        die("work on the default stream: everything belongs to the device's own");
    }
    if (sticky == cudaSuccess) {
        queue.push_back(std::move(work));
        enqueued++;
    }
    return sticky;
}

cudaError_t emulated_launch(const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t s, std::function<void()> body)
{
    int threads = (int)(block.x * block.y * block.z), allowed = 48 << 10;
    auto found = shared_allowed.find(kernel);
    allowed = found != shared_allowed.end() && found->second > allowed ? found->second : allowed;
    if (threads <= 0 || threads > THREADS_MAX || threads % 32 != 0 || block.y != 1 || block.z != 1 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) {
        return cudaErrorInvalidValue;
    }
    if (shared_bytes > (size_t)allowed) {
        return cudaErrorInvalidValue; /* cudaFuncSetAttribute was not asked */
    }
    return emulated_enqueue(s, [=] {
        static const char *const fail = std::getenv("SPURION_EMULATOR_FAIL");
        if (fail != nullptr && access(fail, F_OK) == 0) {
            sticky = cudaErrorIllegalAddress;
            return;
        }
        emulated_block_dim = block;
        emulated_grid_dim = grid;
        for (unsigned z = 0; z < grid.z; z++) {
            for (unsigned y = 0; y < grid.y; y++) {
                for (unsigned x = 0; x < grid.x; x++) {
                    emulated_block_index = dim3(x, y, z);
                    run_block(threads, shared_bytes, body);
                }
            }
        }
    });
}

cudaError_t emulated_shared_allow(const void *kernel, int bytes)
{
    if ((size_t)bytes > shared_max()) {
        return cudaErrorInvalidValue;
    }
    shared_allowed[kernel] = bytes;
    return sticky;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? sticky : cudaErrorInvalidDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device)
{
    if (device != 0) {
        return cudaErrorInvalidDevice;
    }
    std::memset(prop, 0, sizeof *prop);
    std::snprintf(prop->name, sizeof prop->name, "emulated on a CPU");
    prop->major = 9;
    prop->multiProcessorCount = 4;
    prop->sharedMemPerBlockOptin = shared_max();
    prop->totalGlobalMem = device_bytes();
    return sticky;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = new emulated_stream();
    return sticky;
}

cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    drain(enqueued);
    delete s;
    return sticky;
}

cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    count_wait();
    drain(enqueued);
    return sticky;
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    *out = nullptr;
    if (sticky != cudaSuccess) {
        return sticky;
    }
    if (bytes == 0) {
        return cudaSuccess;
    }
    if (bytes > device_bytes() - used_bytes) {
        return cudaErrorMemoryAllocation;
    }
    size_t whole = (bytes + 255) / 256 * 256, map_bytes = (whole + 4095) / 4096 * 4096 + 4096;
    unsigned char *map = (unsigned char *)mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) {
        return cudaErrorMemoryAllocation;
    }
    std::memset(map, 0xff, map_bytes - 4096); /* a device's memory means nothing at first either */
    mprotect(map, map_bytes, PROT_NONE);
    unsigned char *p = map + map_bytes - 4096 - whole; /* ends at the guard page */
    allocations[p] = allocation{map, map_bytes, bytes};
    used_bytes += bytes;
    *out = p;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (p == nullptr) {
        return sticky;
    }
    drain(enqueued);
    auto found = allocations.find((unsigned char *)p);
    if (found == allocations.end()) {
        return cudaErrorInvalidValue;
    }
    munmap(found->second.map, found->second.map_bytes);
    used_bytes -= found->second.bytes;
    allocations.erase(found);
    return sticky;
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned)
{
    *out = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    pinned[(unsigned char *)*out] = bytes;
    return *out == nullptr ? cudaErrorMemoryAllocation : sticky;
}

cudaError_t cudaFreeHost(void *p)
{
    drain(enqueued);
    pinned.erase((unsigned char *)p);
    std::free(p);
    return sticky;
}

cudaError_t cudaMemcpyAsync(void *out, const void *in, size_t bytes, cudaMemcpyKind kind, cudaStream_t s)
{
    const void *host = kind == cudaMemcpyHostToDevice ? in : kind == cudaMemcpyDeviceToHost ? out : nullptr;
    if (host != nullptr && !is_pinned(host, bytes)) {
        die("an asynchronous copy from or to host memory that is not pinned");
    }
    return emulated_enqueue(s, [=] { std::memcpy(out, in, bytes); });
}

cudaError_t cudaMemcpy2DAsync(void *out, size_t out_pitch, const void *in, size_t in_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t s)
{
    if (width > out_pitch || width > in_pitch) {
        return cudaErrorInvalidValue;
    }
    return emulated_enqueue(s, [=] {
        for (size_t r = 0; r < height; r++) {
            std::memcpy((char *)out + r * out_pitch, (const char *)in + r * in_pitch, width);
        }
    });
}

cudaError_t cudaMemsetAsync(void *out, int value, size_t bytes, cudaStream_t s)
{
    return emulated_enqueue(s, [=] { std::memset(out, value, bytes); });
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = device_bytes();
    *free_bytes = *total - used_bytes;
    return sticky;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned)
{
    *out = new emulated_event{0};
    return sticky;
}

cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t)
{
    e->after = enqueued;
    return sticky;
}

cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    drain(e->after);
    return sticky;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end)
{
    if (executed < begin->after || executed < end->after) {
        return cudaErrorInvalidValue; /* not ready */
    }
    *ms = 0.001f;
    return sticky;
}

cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete e;
    return sticky;
}

cudaError_t cudaGetLastError()
{
    return sticky;
}

const char *cudaGetErrorName(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    default: return "cudaErrorUnknown";
    }
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : "see the name";
}
