/*
 * How values lie in the streams of io.h.
 *
 * Numbers, enumerations and plain structures are their bytes. A container is its number of items, 64
 * bits wide, and then its items; a map's items are pairs, the key first.
 */
#ifndef TVM_SUPPORT_SERIALIZER_H_
#define TVM_SUPPORT_SERIALIZER_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

static_assert(TVM_FFI_IO_NO_ENDIAN_SWAP, "streams are little-endian, as WebAssembly is");

template <typename T, typename>
struct Serializer {
  static_assert(std::is_trivially_copyable<T>::value, "there is no Serializer for this type");
  static constexpr bool enabled = true;

  static void Write(Stream* stream, const T& value) {
    stream->Write(static_cast<const void*>(&value), sizeof(T));
  }
  static bool Read(Stream* stream, T* value) {
    return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T);
  }
};

namespace detail {

inline void WriteCount(Stream* stream, size_t count) {
  Serializer<uint64_t>::Write(stream, static_cast<uint64_t>(count));
}

inline bool ReadCount(Stream* stream, size_t* count) {
  uint64_t wide = 0;
  if (!Serializer<uint64_t>::Read(stream, &wide)) return false;
  *count = static_cast<size_t>(wide);
  return true;
}

inline void WriteText(Stream* stream, const char* data, size_t size) {
  WriteCount(stream, size);
  stream->Write(static_cast<const void*>(data), size);
}

inline bool ReadText(Stream* stream, std::string* text) {
  size_t size = 0;
  if (!ReadCount(stream, &size)) return false;
  text->resize(size);
  return stream->Read(static_cast<void*>(&(*text)[0]), size) == size;
}

template <typename Items>
void WriteItems(Stream* stream, const Items& items) {
  WriteCount(stream, items.size());
  for (const auto& item : items) stream->Write(item);
}

template <typename Pairs>
void WritePairs(Stream* stream, const Pairs& pairs) {
  WriteCount(stream, pairs.size());
  for (const auto& pair : pairs) {
    stream->Write(pair.first);
    stream->Write(pair.second);
  }
}

/*! \brief Read a count, and then a T so many times; each is handed to `take`. */
template <typename T, typename Take>
bool ReadItems(Stream* stream, Take take) {
  size_t count = 0;
  if (!ReadCount(stream, &count)) return false;
  for (size_t i = 0; i < count; ++i) {
    T item;
    if (!stream->Read(&item)) return false;
    take(std::move(item));
  }
  return true;
}

/*! \brief Read a count, and then a key and a value so many times; each pair is handed to `take`. */
template <typename K, typename V, typename Take>
bool ReadPairs(Stream* stream, Take take) {
  size_t count = 0;
  if (!ReadCount(stream, &count)) return false;
  for (size_t i = 0; i < count; ++i) {
    K key;
    V value;
    if (!stream->Read(&key) || !stream->Read(&value)) return false;
    take(std::move(key), std::move(value));
  }
  return true;
}

}  // namespace detail

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::string& text) {
    detail::WriteText(stream, text.data(), text.size());
  }
  static bool Read(Stream* stream, std::string* text) { return detail::ReadText(stream, text); }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::String& text) {
    detail::WriteText(stream, text.data(), text.size());
  }
  static bool Read(Stream* stream, ffi::String* text) {
    std::string found;
    if (!detail::ReadText(stream, &found)) return false;
    *text = ffi::String(std::move(found));
    return true;
  }
};

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::vector<T>& items) {
    detail::WriteItems(stream, items);
  }
  static bool Read(Stream* stream, std::vector<T>* items) {
    items->clear();
    return detail::ReadItems<T>(stream, [&](T item) { items->push_back(std::move(item)); });
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Array<T>& items) {
    detail::WriteCount(stream, items.size());
    for (size_t i = 0; i < items.size(); ++i) stream->Write<T>(items[i]);
  }
  static bool Read(Stream* stream, ffi::Array<T>* items) {
    ffi::Array<T> found;
    bool is_whole = detail::ReadItems<T>(stream, [&](T item) { found.push_back(item); });
    *items = std::move(found);
    return is_whole;
  }
};

template <typename K, typename V>
struct Serializer<std::unordered_map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::unordered_map<K, V>& pairs) {
    detail::WritePairs(stream, pairs);
  }
  static bool Read(Stream* stream, std::unordered_map<K, V>* pairs) {
    pairs->clear();
    return detail::ReadPairs<K, V>(
        stream, [&](K key, V value) { pairs->emplace(std::move(key), std::move(value)); });
  }
};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Map<K, V>& pairs) {
    detail::WriteCount(stream, pairs.size());
    for (const auto& pair : pairs) {
      stream->Write<K>(pair.first);
      stream->Write<V>(pair.second);
    }
  }
  static bool Read(Stream* stream, ffi::Map<K, V>* pairs) {
    ffi::Map<K, V> found;
    bool is_whole =
        detail::ReadPairs<K, V>(stream, [&](K key, V value) { found.Set(key, value); });
    *pairs = std::move(found);
    return is_whole;
  }
};

}  // namespace support
}  // namespace tvm

#endif  // TVM_SUPPORT_SERIALIZER_H_
