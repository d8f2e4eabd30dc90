// A CUDA runtime for a machine without a GPU: two devices whose memory is the host's. Preloaded before the real
// libcudart, it answers what torch asks of it. Streams, events, captures and their rules are modelled; copies and memsets
// are real; kernels compiled for a GPU compute nothing. Operators are computed by plugin/pretend_device.py, which announces
// each of them here (`pretend_operator`): in a capture it becomes a node, and a graph's launch calls it back.
//
// What is stricter than the machine: memory is handed out full of 0xFF (NaN in every floating type), and a copy from or
// to pageable memory cannot be captured.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kDevices = 2;
constexpr size_t kPoisoned = size_t{64} << 20;  // larger blocks are left as the system gives them: they may never be touched

// One recorded operation; false stops the replay with an error.
using Node = std::function<bool()>;

struct Graph {
  std::vector<Node> nodes;
};

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  Stream* origin;
  bool invalid = false;
  Graph graph;
};

struct Stream {
  int device;
  unsigned flags;
  int priority;
  std::shared_ptr<Capture> capture;
};

struct Event {
  int device;
  std::shared_ptr<Capture> capture;  // of the stream that it was recorded in last
};

struct Block {
  size_t size;
  int device;
};

std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;
std::map<cudaStream_t, Stream*> streams;
std::map<char*, Block> device_memory;
std::map<char*, size_t> pinned_memory;
std::map<unsigned long long, std::shared_ptr<Capture>> captures;  // those under way
unsigned long long last_capture = 0;
size_t used[kDevices] = {};
int (*replay_operator)(long) = nullptr;

enum Count { kSyncs, kOperators, kKernels, kMallocs, kMemcpys, kGraphs, kPageable, kCounts };
std::atomic<long> counts[kCounts];

thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

size_t total_memory() {
  const char* gigabytes = std::getenv("FASTSIMGAN_PRETEND_CUDA_GB");
  return static_cast<size_t>(gigabytes ? std::atof(gigabytes) * 1e9 : 80e9);
}

Stream* find(cudaStream_t handle) {
  const auto found = streams.find(handle);
  return found == streams.end() ? nullptr : found->second;
}

std::shared_ptr<Capture> capture_of(cudaStream_t handle) {
  const Stream* stream = find(handle);
  return stream ? stream->capture : nullptr;
}

// Calls that a capture forbids anywhere: cudaMalloc, cudaFree, waiting for a device, querying an event.
cudaError_t forbidden_while_capturing(const char* call) {
  const Guard guard(lock);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto& [id, capture] : captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    std::fprintf(stderr, "[pretend CUDA] %s while a stream is captured\n", call);
    capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

cudaError_t wait_for(cudaStream_t handle, const char* call) {
  const Guard guard(lock);
  ++counts[kSyncs];
  if (const auto capture = capture_of(handle)) {
    std::fprintf(stderr, "[pretend CUDA] %s of a stream that is captured\n", call);
    capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

// Do `node` now, or keep it where the stream is being captured. Never call it with the lock held where the node may call
// Python: another thread can hold the interpreter's lock and wait for ours.
cudaError_t enqueue(cudaStream_t handle, Node node) {
  {
    const Guard guard(lock);
    if (const auto capture = capture_of(handle)) {
      capture->graph.nodes.push_back(std::move(node));
      return cudaSuccess;
    }
  }
  return node() ? cudaSuccess : fail(cudaErrorLaunchFailure);
}

cudaError_t kernel(cudaStream_t handle) {
  const Guard guard(lock);
  ++counts[kKernels];
  const Stream* stream = find(handle);
  if (stream && stream->device != current) return fail(cudaErrorInvalidResourceHandle);
  return enqueue(handle, [] { return true; });
}

cudaMemoryType kind(const void* pointer) {
  const auto inside = [&](auto& blocks, auto size) {
    auto block = blocks.upper_bound(const_cast<char*>(static_cast<const char*>(pointer)));
    if (block == blocks.begin()) return false;
    --block;
    return static_cast<const char*>(pointer) < block->first + size(block->second);
  };
  if (inside(device_memory, [](const Block& block) { return block.size; })) return cudaMemoryTypeDevice;
  if (inside(pinned_memory, [](size_t size) { return size; })) return cudaMemoryTypeHost;
  return cudaMemoryTypeUnregistered;
}

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream) {
  const Guard guard(lock);
  ++counts[kMemcpys];
  const bool pageable = kind(to) == cudaMemoryTypeUnregistered || kind(from) == cudaMemoryTypeUnregistered;
  if (pageable) {
    ++counts[kPageable];
    if (const auto capture = capture_of(stream)) {
      std::fprintf(stderr, "[pretend CUDA] a copy of %zu bytes of pageable memory is captured\n", size);
      capture->invalid = true;
      return fail(cudaErrorStreamCaptureUnsupported);
    }
  }
  return enqueue(stream, [=] {
    std::memcpy(to, from, size);
    return true;
  });
}

cudaError_t new_stream(cudaStream_t* handle, unsigned flags, int priority) {
  const Guard guard(lock);
  Stream* stream = new Stream{current, flags, priority, nullptr};
  *handle = reinterpret_cast<cudaStream_t>(stream);
  streams[*handle] = stream;
  return cudaSuccess;
}

cudaError_t new_event(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{current, nullptr});
  return cudaSuccess;
}

}  // namespace

// -- for the plugin ----------------------------------------------------------------------------------------------------

API void pretend_set_replay(int (*function)(long)) { replay_operator = function; }

API void pretend_counts(long* out) {
  for (int i = 0; i < kCounts; ++i) out[i] = counts[i];
}

// An operator is enqueued. 1: it is number `id` of a capture now. 0: it is to be computed at once.
API int pretend_operator(cudaStream_t stream, long id) {
  const Guard guard(lock);
  ++counts[kOperators];
  if (const auto capture = capture_of(stream)) {
    capture->graph.nodes.push_back([id] { return replay_operator(id) == 0; });
    return 1;
  }
  return 0;
}

// -- devices -----------------------------------------------------------------------------------------------------------

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "pretend H100");
  properties->totalGlobalMem = total_memory();
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->sharedMemPerBlock = 49152;
  properties->sharedMemPerBlockOptin = 232448;
  properties->sharedMemPerMultiprocessor = 233472;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->l2CacheSize = 50 << 20;
  properties->textureAlignment = 512;
  properties->pciDeviceID = device;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrComputeCapabilityMajor, 9},        {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrWarpSize, 32},                      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrL2CacheSize, 50 << 20},
  };
  const auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* name, int length, int device) {
  std::snprintf(name, length, "0000:0%d:00.0", device);
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  ++counts[kSyncs];
  return forbidden_while_capturing("cudaDeviceSynchronize");
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// -- memory ------------------------------------------------------------------------------------------------------------

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Guard guard(lock);
  *total = total_memory();
  *free = *total - (used[current] < *total ? used[current] : *total);
  return cudaSuccess;
}
API cudaError_t cudaMalloc(void** pointer, size_t size) {
  if (const auto error = forbidden_while_capturing("cudaMalloc")) return error;
  const Guard guard(lock);
  ++counts[kMallocs];
  if (used[current] + size > total_memory()) return fail(cudaErrorMemoryAllocation);
  if (posix_memalign(pointer, size_t{2} << 20, size)) return fail(cudaErrorMemoryAllocation);
  if (size <= kPoisoned) std::memset(*pointer, 0xFF, size);
  device_memory[static_cast<char*>(*pointer)] = {size, current};
  used[current] += size;
  return cudaSuccess;
}
API cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (const auto error = forbidden_while_capturing("cudaFree")) return error;
  const Guard guard(lock);
  const auto found = device_memory.find(static_cast<char*>(pointer));
  if (found == device_memory.end()) return fail(cudaErrorInvalidValue);
  used[found->second.device] -= found->second.size;
  device_memory.erase(found);
  std::free(pointer);
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  if (const auto error = forbidden_while_capturing("cudaHostAlloc")) return error;
  const Guard guard(lock);
  if (posix_memalign(pointer, 4096, size)) return fail(cudaErrorMemoryAllocation);
  pinned_memory[static_cast<char*>(*pointer)] = size;
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* pointer) {
  const Guard guard(lock);
  pinned_memory.erase(static_cast<char*>(pointer));
  std::free(pointer);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Guard guard(lock);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = kind(pointer);
  if (attributes->type == cudaMemoryTypeUnregistered) return cudaSuccess;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (attributes->type == cudaMemoryTypeHost) {
    attributes->hostPointer = attributes->devicePointer;
  } else {
    const auto block = std::prev(device_memory.upper_bound(static_cast<char*>(const_cast<void*>(pointer))));
    attributes->device = block->second.device;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream);
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  ++counts[kSyncs];
  if (const auto error = forbidden_while_capturing("cudaMemcpy")) return error;
  return copy(to, from, size, nullptr);
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  const Guard guard(lock);
  return enqueue(stream, [=] {
    std::memset(to, value, size);
    return true;
  });
}
API cudaError_t cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}

// -- kernels that nobody computes --------------------------------------------------------------------------------------

API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return kernel(stream); }
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return kernel(stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return kernel(config->stream);
}
API cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return kernel(stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* symbol) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(symbol));
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char memory[1 << 16];
  *address = memory;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// -- streams and events ------------------------------------------------------------------------------------------------

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return new_stream(stream, 0, 0); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) { return new_stream(stream, flags, 0); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return new_stream(stream, flags, priority);
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  const Guard guard(lock);
  const Stream* stream = find(handle);
  *priority = stream ? stream->priority : 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Guard guard(lock);
  if (const auto capture = capture_of(stream)) {
    capture->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(stream, "cudaStreamSynchronize"); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const Guard guard(lock);
  Stream* stream = find(handle);
  const auto& capture = reinterpret_cast<Event*>(event)->capture;
  if (stream && capture && captures.count(capture->id)) stream->capture = capture;  // it joins
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return new_event(event); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_event(event); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  const Guard guard(lock);
  Event* event = reinterpret_cast<Event*>(handle);
  const Stream* found = find(stream);
  if (event->device != (found ? found->device : current)) return fail(cudaErrorInvalidResourceHandle);
  event->capture = capture_of(stream);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventQuery(cudaEvent_t) { return forbidden_while_capturing("cudaEventQuery"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++counts[kSyncs];
  return forbidden_while_capturing("cudaEventSynchronize");
}
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;  // no speed is told here
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return enqueue(stream, [=] {
    function(data);
    return true;
  });
}

// -- captures and graphs -----------------------------------------------------------------------------------------------

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Guard guard(lock);
  Stream* stream = find(handle);
  if (!stream) return fail(cudaErrorStreamCaptureUnsupported);  // the legacy stream
  if (stream->capture) return fail(cudaErrorIllegalState);
  auto capture = std::make_shared<Capture>();
  capture->id = ++last_capture;
  capture->mode = mode;
  capture->origin = stream;
  stream->capture = captures[capture->id] = capture;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Guard guard(lock);
  *graph = nullptr;
  const auto capture = capture_of(handle);
  if (!capture || capture->origin != find(handle)) return fail(cudaErrorIllegalState);
  captures.erase(capture->id);
  for (auto& [name, stream] : streams)
    if (stream->capture == capture) stream->capture = nullptr;
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(new Graph(std::move(capture->graph)));
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Guard guard(lock);
  const auto capture = capture_of(handle);
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  const Guard guard(lock);
  const auto capture = capture_of(handle);
  cudaStreamIsCapturing(handle, status);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  ++counts[kGraphs];
  const Graph* graph = reinterpret_cast<Graph*>(executable);
  return enqueue(stream, [graph] {
    for (const Node& node : graph->nodes)
      if (!node()) return false;
    return true;
  });
}
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = nullptr;
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }

// -- cuBLAS: handles only, its products are operators ------------------------------------------------------------------

API int cublasCreate_v2(void** handle) {
  *handle = std::malloc(8);
  return 0;
}
API int cublasDestroy_v2(void* handle) {
  std::free(handle);
  return 0;
}
API int cublasSetStream_v2(void*, cudaStream_t) { return 0; }
API int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
API int cublasSetMathMode(void*, int) { return 0; }
API int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
API int cublasSetPointerMode_v2(void*, int) { return 0; }
