// Zeroed pages from the system, or of a hidden file mapped into memory; each is touched when first written.
//
// Anonymous memory asks for pages of 2 MiB: a million leaves then need a few entries of the TLB, not a thousand.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

namespace rlv2v {

// A scratch file: created (it must not exist) and unlinked at once, so nothing stays behind however the process ends.
class ScratchFile {
 public:
  // Throws std::system_error.
  explicit ScratchFile(const std::string& path);
  ~ScratchFile();
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  // Grows the file by bytes that the disk reserves, and returns their offset. Throws std::system_error if the disk is
  // full: writing to them later cannot fail.
  std::size_t grow(std::size_t bytes);
  int descriptor() const noexcept { return descriptor_; }

 private:
  std::string path_;
  int descriptor_;
  std::size_t size_ = 0;
};

class Pages {
 public:
  Pages() = default;
  // Throws std::bad_alloc.
  explicit Pages(std::size_t bytes);
  // Maps bytes of the file from offset on, which must be a multiple of the page size.
  Pages(const ScratchFile& file, std::size_t offset, std::size_t bytes);
  ~Pages();
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }

  // Refers to read-only memory that somebody else owns and that outlives this.
  static Pages borrowed(const void* data, std::size_t bytes) noexcept {
    Pages pages;
    pages.data_ = static_cast<unsigned char*>(const_cast<void*>(data));
    pages.bytes_ = bytes;
    return pages;
  }

  unsigned char* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  void swap(Pages& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
  }

  unsigned char* data_ = nullptr;
  std::size_t bytes_ = 0;
  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

// An array of count values of a plain type, at first all zero bytes.
template <class T>
class PageArray {
 public:
  PageArray() = default;
  explicit PageArray(std::size_t count) : pages_(count * sizeof(T)), count_(count) {}
  // Refers to read-only memory; see Pages::borrowed.
  PageArray(const T* values, std::size_t count) : pages_(Pages::borrowed(values, count * sizeof(T))), count_(count) {}
  T* data() const noexcept { return reinterpret_cast<T*>(pages_.data()); }
  T& operator[](std::size_t index) const noexcept { return data()[index]; }
  std::size_t size() const noexcept { return count_; }
  std::size_t bytes() const noexcept { return count_ * sizeof(T); }

 private:
  Pages pages_;
  std::size_t count_ = 0;
};

}  // namespace rlv2v
