/*
 * The part of OpenCL 1.2 that runtime.cc uses, so that no headers of OpenCL need be installed.
 *
 * Functions are looked up by name in the system's library when the runtime is told to.
 */
#ifndef MLC_LLM_OPENCL_H_
#define MLC_LLM_OPENCL_H_

#include <cstddef>
#include <cstdint>

namespace opencl {

using Int = int32_t;
using UInt = uint32_t;
using ULong = uint64_t;
using PlatformID = struct Platform*;
using DeviceID = struct Device*;
using Context = struct ContextObject*;
using Queue = struct QueueObject*;
using Memory = struct MemoryObject*;
using Program = struct ProgramObject*;
using Kernel = struct KernelObject*;
using Event = struct EventObject*;
using Notify = void (*)();

constexpr Int kSuccess = 0;
constexpr UInt kTrue = 1;
constexpr intptr_t kContextPlatform = 0x1084;
constexpr ULong kMemoryReadWrite = 1;
constexpr UInt kProgramBuildLog = 0x1183;

/* What a device tells of itself. */
constexpr UInt kComputeUnits = 0x1002;
constexpr UInt kMaxWorkGroupSize = 0x1004;
constexpr UInt kMaxClockFrequency = 0x100C;
constexpr UInt kMaxAllocationBytes = 0x1010;
constexpr UInt kGlobalCacheBytes = 0x101E;
constexpr UInt kGlobalMemoryBytes = 0x101F;
constexpr UInt kLocalMemoryBytes = 0x1023;
constexpr UInt kName = 0x102B;
constexpr UInt kDriverVersion = 0x102D;
constexpr UInt kVersion = 0x102F;
constexpr UInt kExtensions = 0x1030;

/* name, result, arguments */
#define MLC_LLM_OPENCL_FUNCTIONS(F)                                                              \
  F(clGetDeviceInfo, Int, (DeviceID, UInt, size_t, void*, size_t*))                              \
  F(clCreateContext, Context,                                                                    \
    (const intptr_t*, UInt, const DeviceID*, Notify, void*, Int*))                               \
  F(clCreateCommandQueue, Queue, (Context, DeviceID, ULong, Int*))                               \
  F(clCreateBuffer, Memory, (Context, ULong, size_t, void*, Int*))                               \
  F(clReleaseMemObject, Int, (Memory))                                                           \
  F(clEnqueueReadBuffer, Int,                                                                    \
    (Queue, Memory, UInt, size_t, size_t, void*, UInt, const Event*, Event*))                    \
  F(clEnqueueWriteBuffer, Int,                                                                   \
    (Queue, Memory, UInt, size_t, size_t, const void*, UInt, const Event*, Event*))              \
  F(clEnqueueCopyBuffer, Int,                                                                    \
    (Queue, Memory, Memory, size_t, size_t, size_t, UInt, const Event*, Event*))                 \
  F(clEnqueueNDRangeKernel, Int,                                                                 \
    (Queue, Kernel, UInt, const size_t*, const size_t*, const size_t*, UInt, const Event*,       \
     Event*))                                                                                    \
  F(clCreateProgramWithSource, Program, (Context, UInt, const char**, const size_t*, Int*))      \
  F(clBuildProgram, Int, (Program, UInt, const DeviceID*, const char*, Notify, void*))           \
  F(clGetProgramBuildInfo, Int, (Program, DeviceID, UInt, size_t, void*, size_t*))               \
  F(clReleaseProgram, Int, (Program))                                                            \
  F(clCreateKernel, Kernel, (Program, const char*, Int*))                                        \
  F(clSetKernelArg, Int, (Kernel, UInt, size_t, const void*))                                    \
  F(clFlush, Int, (Queue))                                                                       \
  F(clFinish, Int, (Queue))

/* The functions, each a pointer under OpenCL's own name. */
struct Functions {
#define MLC_LLM_DECLARE(name, result, arguments) result(*name) arguments = nullptr;
  MLC_LLM_OPENCL_FUNCTIONS(MLC_LLM_DECLARE)
#undef MLC_LLM_DECLARE

  /* Fill in all, with `find(name)`; return the name of the first that is missing, or null. */
  template <typename Find>
  const char* Load(Find find) {
#define MLC_LLM_FIND(name, result, arguments)                       \
  this->name = reinterpret_cast<result(*) arguments>(find(#name));  \
  if (this->name == nullptr) return #name;
    MLC_LLM_OPENCL_FUNCTIONS(MLC_LLM_FIND)
#undef MLC_LLM_FIND
    return nullptr;
  }
};

/* The name of an error, without its prefix CL_; null for one that is not expected here. */
inline const char* ErrorName(Int code) {
  switch (code) {
    case -2: return "DEVICE_NOT_AVAILABLE";
    case -3: return "COMPILER_NOT_AVAILABLE";
    case -4: return "MEM_OBJECT_ALLOCATION_FAILURE";
    case -5: return "OUT_OF_RESOURCES";
    case -6: return "OUT_OF_HOST_MEMORY";
    case -8: return "MEM_COPY_OVERLAP";
    case -11: return "BUILD_PROGRAM_FAILURE";
    case -30: return "INVALID_VALUE";
    case -33: return "INVALID_DEVICE";
    case -34: return "INVALID_CONTEXT";
    case -36: return "INVALID_COMMAND_QUEUE";
    case -38: return "INVALID_MEM_OBJECT";
    case -46: return "INVALID_KERNEL_NAME";
    case -49: return "INVALID_ARG_INDEX";
    case -51: return "INVALID_ARG_SIZE";
    case -52: return "INVALID_KERNEL_ARGS";
    case -54: return "INVALID_WORK_GROUP_SIZE";
    case -55: return "INVALID_WORK_ITEM_SIZE";
    case -61: return "INVALID_BUFFER_SIZE";
    case -63: return "INVALID_GLOBAL_WORK_SIZE";
    default: return nullptr;
  }
}

}  // namespace opencl

#endif  // MLC_LLM_OPENCL_H_
