/* Streams whose bytes stand in another stream as Base64. */
#ifndef TVM_SUPPORT_BASE64_H_
#define TVM_SUPPORT_BASE64_H_

#include <tvm/ffi/extra/base64.h>
#include <tvm/ffi/string.h>

#include <memory>
#include <string>

#include "bytes_io.h"

namespace tvm {
namespace support {

/*! \brief Collects bytes; `Finish` writes them. */
class Base64OutStream : public Stream {
 public:
  explicit Base64OutStream(Stream* stream) : stream_(stream) {}

  using Stream::Read;
  using Stream::Write;
  size_t Read(void*, size_t) final { return 0; }
  size_t Write(const void* data, size_t size) final {
    bytes_.append(static_cast<const char*>(data), size);
    return size;
  }
  void Finish() {
    ffi::String text = ffi::Base64Encode(ffi::Bytes(bytes_));
    stream_->Write(static_cast<const void*>(text.data()), text.size());
    bytes_.clear();
  }

 private:
  Stream* stream_;
  std::string bytes_;
};

/*! \brief Reads the whole of another stream in `InitPosition`, and then its bytes. */
class Base64InStream : public Stream {
 public:
  explicit Base64InStream(Stream* stream) : stream_(stream) {}

  using Stream::Read;
  using Stream::Write;
  void InitPosition() {
    std::string text;
    char piece[1024];
    while (size_t size = stream_->Read(static_cast<void*>(piece), sizeof(piece))) {
      text.append(piece, size);
    }
    bytes_ = ffi::Base64Decode(ffi::String(text));
    reader_ = std::make_unique<BytesInStream>(bytes_);
  }
  size_t Read(void* data, size_t size) final { return reader_ ? reader_->Read(data, size) : 0; }
  size_t Write(const void*, size_t) final { return 0; }

 private:
  Stream* stream_;
  ffi::Bytes bytes_;
  std::unique_ptr<BytesInStream> reader_;
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_BASE64_H_
