/* The OpenCL code of a library and what its kernels are called with, as TVM's compiler writes them. */
#ifndef MLC_LLM_OPENCL_LIBRARY_CODE_H_
#define MLC_LLM_OPENCL_LIBRARY_CODE_H_

#include <tvm/ffi/error.h>
#include <tvm/ffi/string.h>

#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mlc_llm {

/* What a library says of a kernel: its arguments, and which numbers after them are its extents. */
struct KernelInfo {
  std::string name;
  std::vector<DLDataType> arguments;
  std::vector<std::string> launch_tags;
};

/* Reads values as TVM's compiler lays them out: numbers are their bytes, counts have 64 bits. */
class Reader {
 public:
  explicit Reader(const tvm::ffi::Bytes& bytes) : next_(bytes.data()), end_(next_ + bytes.size()) {}

  template <typename T>
  T Number() {
    T value;
    std::memcpy(&value, Take(sizeof(T)), sizeof(T));
    return value;
  }

  std::string Text() {
    size_t size = Number<uint64_t>();
    return std::string(Take(size), size);
  }

  template <typename Item>
  void Items(Item item) {
    for (uint64_t left = Number<uint64_t>(); left > 0; --left) item();
  }

 private:
  const char* Take(size_t size) {
    if (size > static_cast<size_t>(end_ - next_)) {
      TVM_FFI_THROW(ValueError) << "the OpenCL code of the library is damaged; compile it again";
    }
    return std::exchange(next_, next_ + size);
  }

  const char* next_;
  const char* end_;
};

struct LibraryCode {
  std::string source;
  std::unordered_map<std::string, KernelInfo> kernels;
};

/* Throws ValueError. */
inline LibraryCode ReadCode(const tvm::ffi::Bytes& bytes) {
  Reader reader(bytes);
  LibraryCode code;
  std::string format = reader.Text();
  if (format != "cl") {
    TVM_FFI_THROW(ValueError) << "OpenCL code of the form " << format << " is not known here";
  }
  reader.Items([&] {
    std::string key = reader.Text();
    KernelInfo& info = code.kernels[key];
    info.name = reader.Text();
    reader.Items([&] { info.arguments.push_back(reader.Number<DLDataType>()); });
    reader.Items([&] { info.launch_tags.push_back(reader.Text()); });
    reader.Items([&] { reader.Number<int32_t>(); });  // marks of CUDA's arguments
  });
  code.source = reader.Text();
  return code;
}

}  // namespace mlc_llm

#endif  // MLC_LLM_OPENCL_LIBRARY_CODE_H_
