// rlv2v._native: the only file that knows Python. It turns arrays into pointers and checks their type and shape; what
// the numbers mean is checked by the core. The core runs without the interpreter lock and never asks for it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "replay/buffer.h"

namespace py = pybind11;

namespace {

using rlv2v::Buffer;
using Shape = std::vector<py::ssize_t>;
using Free = py::call_guard<py::gil_scoped_release>;

std::string describe(const Shape& shape) {
  std::string text = "(";
  for (std::size_t k = 0; k < shape.size(); ++k) {
    if (k > 0) text += ", ";
    text += shape[k] < 0 ? "n" : std::to_string(shape[k]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// The array as C-contiguous T of the shape (-1: any length), copied only when its memory is laid out otherwise.
template <class T>
py::array_t<T, py::array::c_style> checked(const py::handle& value, const char* name, const Shape& shape) {
  const auto expected = [&] {
    return "replay: " + std::string(name) + " must be " + py::str(py::dtype::of<T>()).cast<std::string>() + " " +
           describe(shape) + ", got ";
  };
  if (!py::isinstance<py::array>(value)) {
    throw py::value_error(expected() + py::type::of(value).attr("__name__").template cast<std::string>());
  }
  const auto array = py::reinterpret_borrow<py::array>(value);
  const Shape got(array.shape(), array.shape() + array.ndim());
  bool fits = array.dtype().equal(py::dtype::of<T>()) && got.size() == shape.size();
  for (std::size_t k = 0; fits && k < shape.size(); ++k) fits = shape[k] < 0 || got[k] == shape[k];
  if (!fits) throw py::value_error(expected() + py::str(array.dtype()).cast<std::string>() + " " + describe(got));
  auto contiguous = py::array_t<T, py::array::c_style>::ensure(array);
  if (!contiguous) throw std::bad_alloc();
  return contiguous;
}

template <class T>
py::array_t<T> adopt(std::vector<T>&& values, const Shape& shape) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(shape, kept->data(), owner);
}

template <class T>
std::vector<T> copied(const py::dict& state, const char* name, const Shape& shape) {
  const auto array = checked<T>(state[name], name, shape);
  return std::vector<T>(array.data(), array.data() + array.size());
}

class PyBuffer {
 public:
  PyBuffer(std::size_t capacity, Shape frame_shape, std::size_t max_len, double alpha, double beta, bool stratified,
           std::uint64_t seed, std::size_t max_bytes)
      : frame_shape_(std::move(frame_shape)), buffer_(config(capacity, max_len, alpha, beta, stratified, seed, max_bytes)) {}

  Buffer& core() { return buffer_; }

  std::uint64_t put_clip(const py::object& frames) {
    const auto array = checked<std::uint8_t>(frames, "clip", batch_shape(-1));
    const py::gil_scoped_release free;
    return buffer_.put_clip(array.data(), static_cast<std::size_t>(array.shape(0)));
  }

  std::uint64_t add(const py::list& states, const py::list& actions, const py::object& rewards,
                    const py::list& true_frames, const py::object& positions, const py::object& terminals) {
    const auto count = static_cast<py::ssize_t>(states.size());
    expect_count(actions, "action", states.size());
    expect_count(true_frames, "true_frame", states.size());
    const auto reward = checked<float>(rewards, "reward", {count});
    const auto position = checked<std::int64_t>(positions, "position", {count});
    const auto terminal = checked<bool>(terminals, "terminal", {count});
    std::vector<py::array> kept;  // the memory that the transitions point to
    std::vector<rlv2v::Transition> batch;
    for (py::ssize_t k = 0; k < count; ++k) {
      const auto at = static_cast<std::size_t>(k);
      batch.push_back({window(states[at], "state", true, kept), window(actions[at], "action", false, kept),
                       window(true_frames[at], "true_frame", false, kept), reward.at(k), position.at(k), terminal.at(k)});
    }
    const py::gil_scoped_release free;
    return buffer_.add(batch);
  }

  py::tuple sample(std::size_t n) {
    const auto rows = static_cast<py::ssize_t>(n);
    const auto len = static_cast<py::ssize_t>(buffer_.max_len());
    py::array_t<std::uint8_t> states(window_shape(rows, len));
    py::array_t<std::int64_t> lengths(rows);
    py::array_t<std::uint8_t> actions(batch_shape(rows));
    py::array_t<float> rewards(rows);
    py::array_t<std::uint8_t> next_states(window_shape(rows, len + 1));
    py::array_t<std::uint8_t> true_frames(batch_shape(rows));
    py::array_t<std::int64_t> positions(rows);
    py::array_t<bool> terminals(rows);
    py::array_t<std::int64_t> ids(rows);
    py::array_t<float> weights(rows);
    const rlv2v::SampleOut out{states.mutable_data(),    lengths.mutable_data(),     actions.mutable_data(),
                               rewards.mutable_data(),   next_states.mutable_data(), true_frames.mutable_data(),
                               positions.mutable_data(), terminals.mutable_data(),   ids.mutable_data(),
                               weights.mutable_data()};
    {
      const py::gil_scoped_release free;
      buffer_.sample(n, out);
    }
    return py::make_tuple(states, lengths, actions, rewards, next_states, true_frames, positions, terminals, ids, weights);
  }

  std::size_t update_priorities(const py::object& ids, const py::object& priorities) {
    const auto id = checked<std::int64_t>(ids, "ids", {-1});
    const auto priority = checked<double>(priorities, "priorities", {id.shape(0)});
    const py::gil_scoped_release free;
    return buffer_.update_priorities(id.data(), priority.data(), static_cast<std::size_t>(id.size()));
  }

  py::dict save() {
    rlv2v::Contents contents;
    {
      const py::gil_scoped_release free;
      contents = buffer_.save();
    }
    const auto size = static_cast<py::ssize_t>(contents.lengths.size());
    const auto num_frames = static_cast<py::ssize_t>(contents.frames.size() / buffer_.frame_bytes());
    py::dict state;
    state["frames"] = adopt(std::move(contents.frames), batch_shape(num_frames));
    state["table"] = adopt(std::move(contents.table), {size, static_cast<py::ssize_t>(buffer_.max_len()) + 2});
    state["lengths"] = adopt(std::move(contents.lengths), {size});
    state["rewards"] = adopt(std::move(contents.rewards), {size});
    state["positions"] = adopt(std::move(contents.positions), {size});
    state["terminals"] = adopt(std::move(contents.terminals), {size});
    state["priorities"] = adopt(std::move(contents.priorities), {size});
    state["oldest_id"] = contents.oldest_id;
    state["sampled"] = contents.sampled;
    state["stale"] = contents.stale;
    state["seed"] = contents.seed;
    state["alpha"] = contents.alpha;
    state["beta"] = contents.beta;
    state["max_priority"] = contents.max_priority;
    state["stratified"] = contents.stratified;
    return state;
  }

  void load(const py::dict& state) {
    rlv2v::Contents contents;
    contents.frames = copied<std::uint8_t>(state, "frames", batch_shape(-1));
    contents.table = copied<std::int32_t>(state, "table", {-1, static_cast<py::ssize_t>(buffer_.max_len()) + 2});
    contents.lengths = copied<std::int64_t>(state, "lengths", {-1});
    contents.rewards = copied<float>(state, "rewards", {-1});
    contents.positions = copied<std::int64_t>(state, "positions", {-1});
    contents.terminals = copied<std::uint8_t>(state, "terminals", {-1});
    contents.priorities = copied<float>(state, "priorities", {-1});
    contents.oldest_id = state["oldest_id"].cast<std::uint64_t>();
    contents.sampled = state["sampled"].cast<std::uint64_t>();
    contents.stale = state["stale"].cast<std::uint64_t>();
    contents.seed = state["seed"].cast<std::uint64_t>();
    contents.alpha = state["alpha"].cast<double>();
    contents.beta = state["beta"].cast<double>();
    contents.max_priority = state["max_priority"].cast<float>();
    contents.stratified = state["stratified"].cast<bool>();
    const py::gil_scoped_release free;
    buffer_.load(contents);
  }

 private:
  rlv2v::BufferConfig config(std::size_t capacity, std::size_t max_len, double alpha, double beta, bool stratified,
                             std::uint64_t seed, std::size_t max_bytes) const {
    std::size_t bytes = 1;
    for (const py::ssize_t size : frame_shape_) {
      constexpr std::size_t kMost = std::size_t{1} << 40;
      if (size < 1 || static_cast<std::size_t>(size) > kMost / bytes) {
        throw py::value_error("replay: frame_shape must have sizes of at least 1 and at most 2^40 bytes, got " +
                              describe(frame_shape_));
      }
      bytes *= static_cast<std::size_t>(size);
    }
    return {capacity, bytes, max_len, max_bytes / bytes, alpha, beta, stratified, seed};
  }

  Shape batch_shape(py::ssize_t count) const {
    Shape shape{count};
    shape.insert(shape.end(), frame_shape_.begin(), frame_shape_.end());
    return shape;
  }

  Shape window_shape(py::ssize_t count, py::ssize_t frames) const {
    Shape shape = batch_shape(frames);
    shape.insert(shape.begin(), count);
    return shape;
  }

  static void expect_count(const py::list& values, const char* name, std::size_t count) {
    if (values.size() == count) return;
    throw py::value_error("replay: " + std::string(name) + " must have one entry for each of " + std::to_string(count) +
                          " states, got " + std::to_string(values.size()));
  }

  // A state is an array (p, *frame_shape) or (clip, start, p); one frame is an array frame_shape or (clip, index).
  rlv2v::Window window(const py::handle& value, const char* name, bool is_state, std::vector<py::array>& kept) const {
    if (py::isinstance<py::tuple>(value)) {
      const auto part = py::reinterpret_borrow<py::tuple>(value);
      const auto clip = part[0].cast<std::uint64_t>();
      const auto start = part[1].cast<std::int64_t>();
      const auto length = is_state ? part[2].cast<std::int64_t>() : 1;
      if (start < 0 || length < 1) {
        throw py::index_error("replay: " + std::string(name) + " must start at a frame >= 0 and have at least 1, got start " +
                              std::to_string(start) + ", " + std::to_string(length) + " frames");
      }
      return {clip, static_cast<std::size_t>(start), static_cast<std::size_t>(length), nullptr};
    }
    const auto array = checked<std::uint8_t>(value, name, is_state ? batch_shape(-1) : frame_shape_);
    kept.push_back(array);
    const std::size_t length = is_state ? static_cast<std::size_t>(array.shape(0)) : 1;
    return {rlv2v::kNoClip, 0, length, array.data()};
  }

  Shape frame_shape_;
  Buffer buffer_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native core of rlv2v; use rlv2v.replay.PrioritizedReplay.";

  py::class_<rlv2v::BufferStats>(m, "ReplayStats")
      .def_readonly("size", &rlv2v::BufferStats::size)
      .def_readonly("frames", &rlv2v::BufferStats::frames)
      .def_readonly("clips", &rlv2v::BufferStats::clips)
      .def_readonly("added", &rlv2v::BufferStats::added)
      .def_readonly("evicted", &rlv2v::BufferStats::evicted)
      .def_readonly("sampled", &rlv2v::BufferStats::sampled)
      .def_readonly("stale", &rlv2v::BufferStats::stale)
      .def_readonly("max_priority", &rlv2v::BufferStats::max_priority)
      .def_readonly("bytes_used", &rlv2v::BufferStats::bytes_used);

  py::class_<PyBuffer>(m, "ReplayBuffer")
      .def(py::init<std::size_t, Shape, std::size_t, double, double, bool, std::uint64_t, std::size_t>(),
           py::arg("capacity"), py::arg("frame_shape"), py::arg("max_len"), py::arg("alpha"), py::arg("beta"),
           py::arg("stratified"), py::arg("seed"), py::arg("max_bytes"))
      .def("put_clip", &PyBuffer::put_clip, py::arg("frames"))
      .def("release_clip", [](PyBuffer& self, std::uint64_t clip) { self.core().release_clip(clip); }, py::arg("clip"), Free())
      .def("add", &PyBuffer::add, py::arg("states"), py::arg("actions"), py::arg("rewards"), py::arg("true_frames"),
           py::arg("positions"), py::arg("terminals"))
      .def("sample", &PyBuffer::sample, py::arg("n"))
      .def("update_priorities", &PyBuffer::update_priorities, py::arg("ids"), py::arg("priorities"))
      .def("alpha", [](PyBuffer& self) { return self.core().alpha(); }, Free())
      .def("set_alpha", [](PyBuffer& self, double alpha) { self.core().set_alpha(alpha); }, py::arg("alpha"), Free())
      .def("beta", [](PyBuffer& self) { return self.core().beta(); }, Free())
      .def("set_beta", [](PyBuffer& self, double beta) { self.core().set_beta(beta); }, py::arg("beta"), Free())
      .def("stats", [](PyBuffer& self) { return self.core().stats(); }, Free())
      .def("consistent", [](PyBuffer& self) { return self.core().consistent(); }, Free())
      .def("save", &PyBuffer::save)
      .def("load", &PyBuffer::load, py::arg("state"));
}
