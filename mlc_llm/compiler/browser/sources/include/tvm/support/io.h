/*
 * Byte streams of TVM's runtime, which its packages use and do not bring.
 *
 * Values go in their own bytes, little-endian; how containers go is in serializer.h.
 */
#ifndef TVM_SUPPORT_IO_H_
#define TVM_SUPPORT_IO_H_

#include <tvm/ffi/endian.h>

#include <cstddef>
#include <cstdint>

namespace tvm {
namespace support {

template <typename T, typename = void>
struct Serializer;

/*! \brief Something bytes are read from and written to, in order. */
class Stream {
 public:
  virtual ~Stream() = default;
  /*! \brief Read up to `size` bytes; return how many there were. */
  virtual size_t Read(void* data, size_t size) = 0;
  /*! \brief Write `size` bytes; return how many were taken. */
  virtual size_t Write(const void* data, size_t size) = 0;

  template <typename T>
  bool Read(T* value) {
    return Serializer<T>::Read(this, value);
  }

  template <typename T>
  void Write(const T& value) {
    Serializer<T>::Write(this, value);
  }

  template <typename T>
  bool ReadArray(T* items, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (!Serializer<T>::Read(this, items + i)) return false;
    }
    return true;
  }

  template <typename T>
  void WriteArray(const T* items, size_t count) {
    for (size_t i = 0; i < count; ++i) Serializer<T>::Write(this, items[i]);
  }
};

}  // namespace support
}  // namespace tvm

#include <tvm/support/serializer.h>

#endif  // TVM_SUPPORT_IO_H_
