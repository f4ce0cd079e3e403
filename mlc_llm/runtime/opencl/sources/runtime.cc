/*
 * OpenCL for TVM's virtual machine: its memory (`device_api.opencl`) and its kernels (modules of the
 * kind `opencl`, as TVM's compiler writes them into libraries).
 *
 * Compiled where it is used, by mlc_llm/runtime/opencl/build.py. Which devices there are is said by
 * mlc_llm/opencl.py: nothing is looked for here.
 */
#include <dlfcn.h>
#include <tvm/ffi/cast.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/device_api.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "boundary.h"
#include "device.h"
#include "library_code.h"

namespace mlc_llm {

using tvm::Device;
using tvm::ffi::Any;
using tvm::ffi::Bytes;
using tvm::ffi::PackedArgs;
using tvm::runtime::DeviceAttrKind;

opencl::Functions cl;

namespace {

/* The devices of this process, in the order of their numbers; they live as long as it does. */
struct Registry {
  struct Entry {
    opencl::PlatformID platform;
    opencl::DeviceID id;
    std::unique_ptr<OpenDevice> opened;
  };
  std::mutex mutex;
  std::vector<Entry> devices;

  static Registry& Get() {
    static Registry* registry = new Registry();
    return *registry;
  }
};

int CountDevices() {
  std::lock_guard<std::mutex> lock(Registry::Get().mutex);
  return static_cast<int>(Registry::Get().devices.size());
}

/* Of this thread; compiled code sets it before it calls kernels. */
thread_local int current_device = 0;

/*
 * Take OpenCL's library and its devices: platform and id of each, alternately. Devices that are
 * known already keep their numbers.
 */
void SetDevices(const tvm::ffi::String& library, const tvm::ffi::Array<int64_t>& handles) {
  Registry& registry = Registry::Get();
  std::lock_guard<std::mutex> lock(registry.mutex);
  void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (opened == nullptr) TVM_FFI_THROW(DeviceError) << library << " cannot be loaded: " << dlerror();
  const char* missing = cl.Load([opened](const char* name) { return dlsym(opened, name); });
  if (missing != nullptr) TVM_FFI_THROW(DeviceError) << library << " has no function " << missing;
  for (size_t i = 0; i < handles.size() / 2; ++i) {
    auto platform = reinterpret_cast<opencl::PlatformID>(handles[2 * i]);
    auto id = reinterpret_cast<opencl::DeviceID>(handles[2 * i + 1]);
    if (i < registry.devices.size()) {
      TVM_FFI_ICHECK(registry.devices[i].id == id) << "opencl:" << i << " was another device";
    } else {
      registry.devices.push_back({platform, id, nullptr});
    }
  }
}

/* Return what TVM asks of a device, null for what OpenCL does not tell. */
Any Attribute(int index, DeviceAttrKind kind) {
  if (kind == tvm::runtime::kExist) return static_cast<int>(index >= 0 && index < CountDevices());
  OpenDevice& device = GetDevice(index);
  switch (kind) {
    case tvm::runtime::kMaxThreadsPerBlock:
      return static_cast<int64_t>(device.Number<size_t>(opencl::kMaxWorkGroupSize));
    case tvm::runtime::kWarpSize:
      return 1;  // kernels may not rely on threads that go in step
    case tvm::runtime::kMaxSharedMemoryPerBlock:
      return static_cast<int64_t>(device.Number<opencl::ULong>(opencl::kLocalMemoryBytes));
    case tvm::runtime::kComputeVersion:
    case tvm::runtime::kApiVersion:
      return tvm::ffi::String(device.Text(opencl::kVersion));
    case tvm::runtime::kDeviceName:
      return tvm::ffi::String(device.Text(opencl::kName));
    case tvm::runtime::kDriverVersion:
      return tvm::ffi::String(device.Text(opencl::kDriverVersion));
    case tvm::runtime::kMaxClockRate:  // in kHz
      return int64_t{1000} * device.Number<opencl::UInt>(opencl::kMaxClockFrequency);
    case tvm::runtime::kMultiProcessorCount:
      return static_cast<int64_t>(device.Number<opencl::UInt>(opencl::kComputeUnits));
    case tvm::runtime::kL2CacheSizeBytes:
      return static_cast<int64_t>(device.Number<opencl::ULong>(opencl::kGlobalCacheBytes));
    case tvm::runtime::kTotalGlobalMemory:
      return static_cast<int64_t>(device.Number<opencl::ULong>(opencl::kGlobalMemoryBytes));
    case tvm::runtime::kAvailableGlobalMemory:  // what other programs use is not told
      return static_cast<int64_t>(device.FreeBytes());
    default:
      return nullptr;
  }
}

/* A part of a tensor's memory, on a device or the host. */
struct Part {
  Device device;
  void* data;
  size_t offset;

  bool is_host() const { return device.device_type == kDLCPU; }
  char* host_pointer() const { return static_cast<char*>(data) + offset; }
  OpenDevice& opened() const { return GetDevice(device.device_id); }
  opencl::Memory Find(size_t size) const {
    Buffer buffer = opened().Find(data);
    TVM_FFI_ICHECK(offset <= buffer.size && size <= buffer.size - offset)
        << size << " bytes from " << offset << " are not within a buffer of " << buffer.size;
    return buffer.memory;
  }
};

/* The host's memory may be gone after a copy: transfers are waited for. */
void Write(const char* from, const Part& to, size_t size) {
  Check(cl.clEnqueueWriteBuffer(to.opened().queue(), to.Find(size), opencl::kTrue, to.offset, size,
                                from, 0, nullptr, nullptr),
        "copy a tensor to the device");
}

void Read(const Part& from, char* to, size_t size) {
  Check(cl.clEnqueueReadBuffer(from.opened().queue(), from.Find(size), opencl::kTrue, from.offset,
                               size, to, 0, nullptr, nullptr),
        "copy a tensor from the device");
}

void Copy(const Part& from, const Part& to, size_t size) {
  if (size == 0) return;
  if (from.is_host()) {
    Write(from.host_pointer(), to, size);
  } else if (to.is_host()) {
    Read(from, to.host_pointer(), size);
  } else if (from.device.device_id == to.device.device_id) {
    Check(cl.clEnqueueCopyBuffer(from.opened().queue(), from.Find(size), to.Find(size), from.offset,
                                 to.offset, size, 0, nullptr, nullptr),
          "copy a tensor");
  } else {
    std::vector<char> staging(size);
    Read(from, staging.data(), size);
    Write(staging.data(), to, size);
  }
}

class DeviceAPI final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(Device device) final { current_device = device.device_id; }

  void GetAttr(Device device, DeviceAttrKind kind, Any* result) final {
    Guarded([=] { *result = Attribute(device.device_id, kind); });
  }

  void* AllocDataSpace(Device device, size_t size, size_t, DLDataType) final {
    void* pointer = nullptr;
    Guarded([device, size, &pointer] { pointer = GetDevice(device.device_id).Allocate(size); });
    return pointer;
  }

  void FreeDataSpace(Device device, void* pointer) final {
    Guarded([=] { GetDevice(device.device_id).Free(pointer); });
  }

  void StreamSync(Device device, TVMStreamHandle) final {
    Guarded([=] { Check(cl.clFinish(GetDevice(device.device_id).queue()), "finish its work"); });
  }

 protected:
  using tvm::runtime::DeviceAPI::CopyDataFromTo;

  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset, size_t size,
                      Device from_device, Device to_device, DLDataType, TVMStreamHandle) final {
    Part source{from_device, const_cast<void*>(from), from_offset};
    Part target{to_device, to, to_offset};
    Guarded([&] { Copy(source, target, size); });
  }
};

/*
 * A library's kernels: built for a device when one of them is first called there, and kept: when the
 * last library goes, the driver may be gone already.
 */
class Module final : public tvm::ffi::ModuleObj {
 public:
  explicit Module(const Bytes& bytes) : bytes_(bytes), code_(ReadCode(bytes)) {}

  const char* kind() const final { return "opencl"; }
  int GetPropertyMask() const final {
    return tvm::ffi::Module::kBinarySerializable | tvm::ffi::Module::kRunnable;
  }
  Bytes SaveToBytes() const final { return bytes_; }
  tvm::ffi::String InspectSource(const tvm::ffi::String&) const final { return code_.source; }

  tvm::ffi::Optional<tvm::ffi::Function> GetFunction(const tvm::ffi::String& name) final {
    auto found = code_.kernels.find(name);
    if (found == code_.kernels.end()) return std::nullopt;
    auto self = tvm::ffi::GetRef<tvm::ffi::Module>(this);  // keeps it alive
    return ThroughC(tvm::ffi::Function::FromPacked(
        [this, self, info = &found->second](PackedArgs args, Any*) { Launch(*info, args); }));
  }

 private:
  struct Built {
    opencl::Program program;
    std::unordered_map<std::string, opencl::Kernel> kernels;
  };

  void Launch(const KernelInfo& info, PackedArgs args) {
    OpenDevice& device = GetDevice(current_device);
    size_t num_arguments = info.arguments.size();
    TVM_FFI_ICHECK_EQ(args.size(), num_arguments + info.launch_tags.size()) << info.name;
    size_t global[3] = {1, 1, 1}, local[3] = {1, 1, 1};
    for (size_t i = 0; i < info.launch_tags.size(); ++i) {
      const std::string& tag = info.launch_tags[i];  // as in blockIdx.x
      size_t axis = tag.back() - 'x';
      bool is_block = tag.rfind("blockIdx.", 0) == 0, is_thread = tag.rfind("threadIdx.", 0) == 0;
      TVM_FFI_ICHECK((is_block || is_thread) && axis < 3) << info.name << " is launched by " << tag;
      (is_block ? global : local)[axis] = args[num_arguments + i].cast<int64_t>();
    }
    for (int axis = 0; axis < 3; ++axis) {
      global[axis] *= local[axis];
      if (global[axis] == 0) return;  // an empty tensor
    }
    // Arguments are set and then the kernel is called: one thread at a time.
    static std::mutex launching;
    std::lock_guard<std::mutex> lock(launching);
    opencl::Kernel kernel = Prepare(device, info);
    for (size_t i = 0; i < num_arguments; ++i) {
      // The value itself: a pointer of a device is no object that could be cast.
      SetArgument(device, kernel, i, info.arguments[i],
                  reinterpret_cast<const TVMFFIAny*>(args.data())[i]);
    }
    opencl::Int code = cl.clEnqueueNDRangeKernel(device.queue(), kernel, 3, nullptr, global, local,
                                                 0, nullptr, nullptr);
    if (code != opencl::kSuccess) {
      TVM_FFI_THROW(DeviceError)
          << device.Name() << " does not run the kernel " << info.name << " (" << Describe(code)
          << "): groups of " << local[0] << " x " << local[1] << " x " << local[2]
          << " threads; the device allows " << device.Number<size_t>(opencl::kMaxWorkGroupSize);
    }
    device.CountLaunch();
  }

  static void SetArgument(OpenDevice& device, opencl::Kernel kernel, size_t index, DLDataType type,
                          const TVMFFIAny& value) {
    TVM_FFI_ICHECK(type.lanes == 1 && (type.code != kDLFloat || type.bits >= 32))
        << "a kernel takes a number of a type that is not known here";
    size_t size = (type.bits + 7) / 8;
    const void* data = &value.v_int64;  // integers come with 64 bits, the lowest first
    opencl::Memory memory = nullptr;
    float narrow = 0;
    if (type.code == kDLOpaqueHandle) {
      if (value.v_ptr != nullptr) memory = device.Find(value.v_ptr).memory;
      data = &memory;
      size = sizeof(memory);
    } else if (type.code == kDLFloat && type.bits == 32) {
      narrow = static_cast<float>(value.v_float64);
      data = &narrow;
    }
    Check(cl.clSetKernelArg(kernel, index, size, data), "set an argument of a kernel");
  }

  opencl::Kernel Prepare(OpenDevice& device, const KernelInfo& info) {
    auto found = built_.find(device.id());
    if (found == built_.end()) found = built_.emplace(device.id(), Built{Build(device), {}}).first;
    opencl::Kernel& kernel = found->second.kernels[info.name];
    if (kernel == nullptr) {
      opencl::Int code;
      kernel = cl.clCreateKernel(found->second.program, info.name.c_str(), &code);
      Check(code, ("find the kernel " + info.name).c_str());
    }
    return kernel;
  }

  opencl::Program Build(OpenDevice& device) const {
    if (code_.source.find("cl_khr_fp16") != std::string::npos &&
        device.Text(opencl::kExtensions).find("cl_khr_fp16") == std::string::npos) {
      TVM_FFI_THROW(DeviceError)
          << device.Name() << " does not compute in float16 (cl_khr_fp16), which the library needs; "
          << "use a quantization of float32, as q4f32_1";
    }
    opencl::Int code;
    const char* text = code_.source.c_str();
    size_t size = code_.source.size();
    auto program = cl.clCreateProgramWithSource(device.context(), 1, &text, &size, &code);
    Check(code, "take the code of the library");
    opencl::DeviceID id = device.id();
    code = cl.clBuildProgram(program, 1, &id, "", nullptr, nullptr);
    if (code != opencl::kSuccess) {
      std::string log(1 << 16, '\0');
      cl.clGetProgramBuildInfo(program, id, opencl::kProgramBuildLog, log.size(), &log[0], nullptr);
      cl.clReleaseProgram(program);
      TVM_FFI_THROW(DeviceError) << device.Name() << " cannot compile the library's code ("
                                 << Describe(code) << "): " << log.c_str();
    }
    return program;
  }

  const Bytes bytes_;
  const LibraryCode code_;
  std::unordered_map<opencl::DeviceID, Built> built_;
};

}  // namespace

OpenDevice& GetDevice(int index) {
  Registry& registry = Registry::Get();
  std::lock_guard<std::mutex> lock(registry.mutex);
  if (index < 0 || index >= static_cast<int>(registry.devices.size())) {
    TVM_FFI_THROW(DeviceError) << "there is no opencl:" << index << " here; there are "
                               << registry.devices.size() << " devices";
  }
  auto& entry = registry.devices[index];
  if (entry.opened == nullptr) {
    entry.opened = std::make_unique<OpenDevice>(index, entry.platform, entry.id);
  }
  return *entry.opened;
}

template <typename Call>
void Define(const char* name, Call call) {
  tvm::ffi::Function::SetGlobal(name, ThroughC(tvm::ffi::Function::FromTyped(call)));
}

TVM_FFI_STATIC_INIT_BLOCK() {
  Define("mlc_llm.opencl.set_devices", SetDevices);
  Define(kErrorFunction, ThrowKeptError);
  Define("device_api.opencl", [] {
    static DeviceAPI* api = new DeviceAPI();
    return static_cast<void*>(static_cast<tvm::runtime::DeviceAPI*>(api));
  });
  Define("ffi.Module.load_from_bytes.opencl", [](const Bytes& bytes) {
    return tvm::ffi::Module(tvm::ffi::make_object<Module>(bytes));
  });
}

}  // namespace mlc_llm
