/*
 * Devices that OpenCL opened, and their memory as ranges of addresses.
 *
 * TVM adds offsets to pointers of a device, OpenCL's buffers are handles without a number to add to.
 * So each buffer has a range of invented addresses, which no processor can follow:
 *
 *     address   kFirstAddress ... [ buffer 1 ] gap [ buffer 2 ] gap ...
 *     in OpenCL                   handle 1,        handle 2,
 *                                 address - start  address - start
 */
#ifndef MLC_LLM_OPENCL_DEVICE_H_
#define MLC_LLM_OPENCL_DEVICE_H_

#include <tvm/ffi/error.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "opencl.h"

namespace mlc_llm {

constexpr uintptr_t kFirstAddress = uintptr_t{1} << 60;
constexpr uintptr_t kPage = 4096;
/* Kernels that may wait in the queue before the device is told of them. */
constexpr int kLaunchesPerFlush = 32;

extern opencl::Functions cl;

/* Return an error of OpenCL for people to read. */
inline std::string Describe(opencl::Int code) {
  const char* name = opencl::ErrorName(code);
  return name == nullptr ? "error " + std::to_string(code) : std::string("CL_") + name;
}

inline void Check(opencl::Int code, const std::string& action) {
  if (code != opencl::kSuccess) {
    TVM_FFI_THROW(DeviceError) << "OpenCL could not " << action << " (" << Describe(code) << ")";
  }
}

/* Return a size for people to read. */
inline std::string InMiB(uint64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

/* A place in a buffer of OpenCL. */
struct Place {
  opencl::Memory memory;
  size_t offset;
  size_t size;  // from the offset to the end of the buffer
};

/* A device with its context, its one queue, which keeps the order, and its buffers. */
class OpenDevice {
 public:
  OpenDevice(int index, opencl::PlatformID platform, opencl::DeviceID id) : index_(index), id_(id) {
    const intptr_t properties[] = {opencl::kContextPlatform, reinterpret_cast<intptr_t>(platform),
                                   0};
    opencl::Int code;
    context_ = cl.clCreateContext(properties, 1, &id, nullptr, nullptr, &code);
    Check(code, "open " + Name());
    queue_ = cl.clCreateCommandQueue(context_, id, 0, &code);
    Check(code, "make a queue of " + Name());
    base_alignment_ = Number<opencl::UInt>(opencl::kBaseAddressAlignBits) / 8;
    memory_bytes_ = Number<opencl::ULong>(opencl::kGlobalMemoryBytes);
  }

  opencl::DeviceID id() const { return id_; }
  opencl::Context context() const { return context_; }
  opencl::Queue queue() const { return queue_; }
  uint64_t free_bytes() const { return memory_bytes_ - std::min(memory_bytes_, used_bytes_); }

  template <typename T>
  T Number(opencl::UInt what) const {
    T value{};
    Check(cl.clGetDeviceInfo(id_, what, sizeof(T), &value, nullptr), "describe the device");
    return value;
  }

  std::string Text(opencl::UInt what) const {
    size_t size = 0;
    Check(cl.clGetDeviceInfo(id_, what, 0, nullptr, &size), "describe the device");
    std::string text(size, '\0');
    Check(cl.clGetDeviceInfo(id_, what, size, &text[0], nullptr), "describe the device");
    return text.c_str();  // without the zero at its end
  }

  std::string Name() const {
    return "opencl:" + std::to_string(index_) + " (" + Text(opencl::kName) + ")";
  }

  /* Return the first address of a new buffer. Throws DeviceError where memory does not suffice. */
  void* Allocate(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    size = std::max<size_t>(size, 1);
    // Drivers take more than there is, and fail or crawl when it is first used.
    if (size > free_bytes()) RefuseMemory(size, "that is more than the device has");
    opencl::Int code;
    opencl::Memory memory =
        cl.clCreateBuffer(context_, opencl::kMemoryReadWrite, size, nullptr, &code);
    if (code != opencl::kSuccess) RefuseMemory(size, Describe(code));
    uintptr_t start = next_address_;
    next_address_ = start + (size / kPage + 2) * kPage;
    buffers_[start] = {memory, size};
    used_bytes_ += size;
    return reinterpret_cast<void*>(start);
  }

  /* OpenCL keeps a buffer until the commands that use it are done. */
  void Free(void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = buffers_.find(reinterpret_cast<uintptr_t>(pointer));
    TVM_FFI_ICHECK(found != buffers_.end()) << pointer << " is no buffer of " << Name();
    Check(cl.clReleaseMemObject(found->second.memory), "free a buffer");
    used_bytes_ -= found->second.size;
    buffers_.erase(found);
  }

  /* Return where an address of this device is. Throws DeviceError where there is nothing. */
  Place Find(const void* pointer, size_t offset = 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer) + offset;
    auto after = buffers_.upper_bound(address);
    if (after != buffers_.begin()) {
      const auto& [start, buffer] = *std::prev(after);
      size_t inside = address - start;
      if (inside < buffer.size) return {buffer.memory, inside, buffer.size - inside};
    }
    TVM_FFI_THROW(DeviceError) << "there is no memory of " << Name() << " at " << pointer;
    TVM_FFI_UNREACHABLE();
  }

  /* Set an argument of a kernel to an address, which may be inside a buffer, or null. */
  void SetPointer(opencl::Kernel kernel, opencl::UInt index, const void* pointer) {
    opencl::Memory memory = nullptr;
    Place place{};
    if (pointer != nullptr) {
      place = Find(pointer);
      memory = place.memory;
    }
    opencl::Int code = opencl::kSuccess;
    if (place.offset != 0) {
      opencl::BufferRegion region{place.offset, place.size};
      memory = cl.clCreateSubBuffer(place.memory, 0, opencl::kBufferCreateRegion, &region, &code);
      if (code != opencl::kSuccess) {
        TVM_FFI_THROW(DeviceError)
            << "a tensor that begins " << place.offset << " bytes into its buffer cannot be used "
            << "by a kernel (" << Describe(code) << "): " << Name() << " wants a multiple of "
            << base_alignment_;
      }
    }
    code = cl.clSetKernelArg(kernel, index, sizeof(memory), &memory);
    // The kernel's call keeps what it needs.
    if (place.offset != 0) parts_.push_back(memory);
    Check(code, "set argument " + std::to_string(index) + " of a kernel");
  }

  /* After a launch: the parts of buffers that it was given are not needed any more. */
  void ReleaseParts() {
    for (opencl::Memory part : parts_) cl.clReleaseMemObject(part);
    parts_.clear();
  }

  void CountLaunch() {
    if (++launches_ % kLaunchesPerFlush == 0) Check(cl.clFlush(queue_), "start kernels");
  }

 private:
  struct Buffer {
    opencl::Memory memory;
    size_t size;
  };

  [[noreturn]] void RefuseMemory(size_t size, const std::string& reason) {
    TVM_FFI_THROW(DeviceError)
        << "out of memory: " << InMiB(size) << " were asked of " << Name() << " (" << reason
        << "); it has " << InMiB(memory_bytes_) << " in all, of which "
        << InMiB(used_bytes_) << " are used here, and gives at most "
        << InMiB(Number<opencl::ULong>(opencl::kMaxAllocationBytes))
        << " at once; use a smaller model, a shorter context or fewer requests at a time";
    TVM_FFI_UNREACHABLE();
  }

  const int index_;
  const opencl::DeviceID id_;
  opencl::Context context_;
  opencl::Queue queue_;
  size_t base_alignment_;
  uint64_t memory_bytes_, used_bytes_ = 0;
  std::mutex mutex_;
  std::map<uintptr_t, Buffer> buffers_;
  uintptr_t next_address_ = kFirstAddress;
  std::vector<opencl::Memory> parts_;
  int launches_ = 0;
};

/* Return a device by its number, opened at its first use. Throws DeviceError for one not there. */
OpenDevice& GetDevice(int index);

}  // namespace mlc_llm

#endif  // MLC_LLM_OPENCL_DEVICE_H_
