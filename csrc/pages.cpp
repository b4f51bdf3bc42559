#include "pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <new>
#include <system_error>

namespace rlv2v {
namespace {

constexpr std::size_t kHuge = std::size_t{1} << 21;

[[noreturn]] void fail(int code, const std::string& message) {
  throw std::system_error(code, std::generic_category(), message);
}

}  // namespace

ScratchFile::ScratchFile(const std::string& path)
    : path_(path), descriptor_(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)) {
  if (descriptor_ < 0) fail(errno, "replay: cannot create storage file " + path);
  ::unlink(path.c_str());
}

ScratchFile::~ScratchFile() { ::close(descriptor_); }

std::size_t ScratchFile::grow(std::size_t bytes) {
  const int code = ::posix_fallocate(descriptor_, static_cast<off_t>(size_), static_cast<off_t>(bytes));
  if (code != 0) fail(code, "replay: cannot grow storage file " + path_ + " by " + std::to_string(bytes) + " bytes");
  size_ += bytes;
  return size_ - bytes;
}

Pages::Pages(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  // Leaves room to begin at a multiple of 2 MiB.
  const std::size_t slack = bytes >= kHuge ? kHuge : 0;
  mapped_bytes_ = bytes + slack;
  mapped_ = ::mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw std::bad_alloc();
  }
  auto address = reinterpret_cast<std::uintptr_t>(mapped_);
  if (slack > 0) address = (address + kHuge - 1) / kHuge * kHuge;
  data_ = reinterpret_cast<unsigned char*>(address);
#ifdef MADV_HUGEPAGE
  if (slack > 0) ::madvise(data_, bytes, MADV_HUGEPAGE);  // only advice: without it all is slower
#endif
}

Pages::Pages(const ScratchFile& file, std::size_t offset, std::size_t bytes) : bytes_(bytes), mapped_bytes_(bytes) {
  mapped_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.descriptor(), static_cast<off_t>(offset));
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw std::bad_alloc();
  }
  data_ = static_cast<unsigned char*>(mapped_);
}

Pages::~Pages() {
  if (mapped_ != nullptr) ::munmap(mapped_, mapped_bytes_);
}

}  // namespace rlv2v
