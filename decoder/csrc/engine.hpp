// The int8 decoder of one model: owns the packed weights, the state of requests and the threads of a step.
// Knows nothing of Python; wrong arguments are std::invalid_argument.
//
// Legend: D model width, K beams, P beams of the previous step, S prompt tokens, h heads, d head width, t level.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "layout.hpp"

namespace decoder {

extern const Kernels portable_kernels;
#if defined(DECODER_X86)
extern const Kernels avx2_kernels, avx512_kernels;
#endif

// Kernels this machine can run, fastest first.
inline std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(DECODER_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512_kernels);
  if (avx2) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

// The kernels of that name, or the fastest for an empty name.
inline const Kernels& choose_kernels(const std::string& name) {
  const auto found = available_kernels();
  for (const Kernels* kernels : found)
    if (name.empty() || name == kernels->name) return *kernels;
  throw std::invalid_argument("kernels '" + name + "' are unknown or not available on this machine");
}

// Zeroed, aligned to cache lines.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t count)
      : data_(static_cast<T*>(::operator new[](std::max<std::size_t>(count, 1) * sizeof(T), kAlign))), count_(count) {
    std::memset(data_.get(), 0, count * sizeof(T));
  }
  T* data() const { return data_.get(); }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, kAlign); }
  };
  std::unique_ptr<T[], Free> data_;
  std::size_t count_ = 0;
};

inline std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// b [k, n] with strides in elements -> panels [n / panel][k][panel].
inline Buffer<float> pack(const float* b, std::size_t k, std::size_t n, std::size_t k_stride, std::size_t n_stride,
                          std::size_t panel) {
  Buffer<float> panels(round_up(n, panel) * k);
  for (std::size_t column = 0; column < n; ++column)
    for (std::size_t i = 0; i < k; ++i)
      panels[column / panel * panel * k + i * panel + column % panel] = b[i * k_stride + column * n_stride];
  return panels;
}

// Owns what a `Linear` points at.
class Weights {
 public:
  Weights() = default;
  // weight [n, k]; scale and bias [n].
  Weights(const std::int8_t* weight, std::span<const float> scale, std::span<const float> bias, std::size_t k,
          const Kernels& kernels)
      : panels_(round_up(scale.size(), kernels.panel) * k), offset_(round_up(scale.size(), kernels.panel)),
        scale_(offset_.size()), bias_(offset_.size()) {
    const std::size_t panel = kernels.panel, n = scale.size();
    if (k % 16 || n % 16) throw std::invalid_argument("sizes of a product are not multiples of 16");
    std::copy(scale.begin(), scale.end(), scale_.data());
    std::copy(bias.begin(), bias.end(), bias_.data());
    for (std::size_t row = 0; row < n; ++row) {
      std::int8_t* to = panels_.data() + row / panel * panel * k;
      std::int32_t sum = 0;
      for (std::size_t i = 0; i < k; ++i) {
        sum += weight[row * k + i];
        to[(i / 4 * panel + row % panel) * 4 + i % 4] = weight[row * k + i];
      }
      offset_[row] = -kernels.zero * sum;
    }
    view_ = {int(n), int(k), panels_.data(), offset_.data(), scale_.data(), bias_.data()};
  }
  const Linear& view() const { return view_; }

 private:
  Buffer<std::int8_t> panels_;
  Buffer<std::int32_t> offset_;
  Buffer<float> scale_, bias_;
  Linear view_{};
};

// Room of one request or one thread; handed back to the model and used again.
struct Room {
  std::vector<Buffer<float>> keys, values;  // [layers * levels], grown to the beams seen
  Buffer<float> x, wide, attended, scores, scale;
  Buffer<std::uint8_t> bytes;
};

template <class T>
void grow(Buffer<T>& buffer, std::size_t count) {
  if (buffer.size() < count) buffer = Buffer<T>(count);
}

class Model {
 public:
  Model(Shape shape, std::vector<int> sizes, const std::string& kernels)
      : shape_(shape), sizes_(std::move(sizes)), kernels_(choose_kernels(kernels)) {
    shape_.levels = int(sizes_.size());
    if (shape.heads < 1 || shape.width % shape.heads || shape.width / shape.heads % 16 || shape.ffn % 16 ||
        shape.ffn < 1 || sizes_.empty())
      throw std::invalid_argument("width " + std::to_string(shape.width) + " with " + std::to_string(shape.heads) +
                                  " heads and ffn " + std::to_string(shape.ffn) +
                                  ": heads and ffn must be multiples of 16 wide");
  }

  const Shape& shape() const { return shape_; }
  const std::vector<int>& sizes() const { return sizes_; }
  const Kernels& kernels() const { return kernels_; }

  void add_layer(std::vector<Weights> products, std::vector<std::vector<float>> norms) {
    static constexpr std::size_t kProducts = 8, kNorms = 3;
    if (products.size() != kProducts || norms.size() != kNorms)
      throw std::invalid_argument("a layer has 8 products and 3 norms");
    products_.push_back(std::move(products));
    norms_.push_back(std::move(norms));
    const auto& p = products_.back();
    const auto& n = norms_.back();
    for (std::size_t i = 0; i < kProducts; ++i) {
      const int in = i == 7 ? shape_.ffn : shape_.width, out = i == 6 ? shape_.ffn : shape_.width;
      if (p[i].view().k != in || p[i].view().n != out)
        throw std::invalid_argument("a product of a layer has a wrong shape");
    }
    layers_.push_back({p[0].view(), p[1].view(), p[2].view(), p[3].view(), p[4].view(), p[5].view(), p[6].view(),
                       p[7].view(), norm(n[0]), norm(n[1]), norm(n[2])});
    shape_.layers = int(layers_.size());
  }

  // embeddings [1 + Σ sizes, D]: row 0 starts a SID, then the codes of all levels; they are the head as well.
  void set_tables(std::vector<float> embeddings, std::vector<float> positions, std::vector<float> norms,
                  std::vector<float> head_bias) {
    std::size_t codes = 0;
    for (const int size : sizes_) codes += std::size_t(size);
    const std::size_t width = shape_.width;
    if (embeddings.size() != (codes + 1) * width || positions.size() != sizes_.size() * width ||
        head_bias.size() != codes)
      throw std::invalid_argument("embeddings, positions or head bias have a wrong shape");
    embeddings_ = std::move(embeddings), positions_ = std::move(positions), embedding_norm_ = std::move(norms);
    head_bias_ = std::move(head_bias);
    norm(embedding_norm_);
    std::size_t first = 1;
    for (const int size : sizes_) {
      heads_.push_back(pack(embeddings_.data() + first * width, width, size, 1, width, kernels_.panel));
      first += size;
    }
  }

 private:
  friend class Request;

  Norm norm(const std::vector<float>& both) const {
    if (both.size() != 2 * std::size_t(shape_.width)) throw std::invalid_argument("a norm has a wrong shape");
    return {both.data(), both.data() + shape_.width};
  }

  std::unique_ptr<Room> take() {
    const std::lock_guard lock(mutex_);
    if (rooms_.empty()) return std::make_unique<Room>();
    auto room = std::move(rooms_.back());
    rooms_.pop_back();
    return room;
  }

  void give(std::unique_ptr<Room> room) {
    const std::lock_guard lock(mutex_);
    rooms_.push_back(std::move(room));
  }

  Shape shape_;
  std::vector<int> sizes_;
  const Kernels& kernels_;
  std::vector<std::vector<Weights>> products_;
  std::vector<std::vector<std::vector<float>>> norms_;
  std::vector<Layer> layers_;
  std::vector<float> embeddings_, positions_, embedding_norm_, head_bias_;
  std::vector<Buffer<float>> heads_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Room>> rooms_;
};

// One search: the prompt's keys and values, and what the beams of every level left behind. Not for two threads.
class Request {
 public:
  // bias [S]; per layer keys [h, d, S], scaled, and values [h, S, d], as the prefill graph gives them.
  Request(std::shared_ptr<Model> model, std::span<const float> bias, const std::vector<const float*>& keys,
          const std::vector<const float*>& values)
      : model_(std::move(model)), room_(model_->take()), prompt_(bias.size()) {
    const Shape& shape = model_->shape_;
    const std::size_t panel = model_->kernels_.panel, size = shape.width / shape.heads;
    bias_ = Buffer<float>(round_up(prompt_, panel));
    std::copy(bias.begin(), bias.end(), bias_.data());
    for (std::size_t layer = 0; layer < keys.size(); ++layer)
      for (int head = 0; head < shape.heads; ++head) {
        const std::size_t start = head * size * prompt_;
        packed_.push_back(pack(keys[layer] + start, size, prompt_, prompt_, 1, panel));
        keys_.push_back(packed_.back().data());
        packed_.push_back(pack(values[layer] + start, prompt_, size, size, 1, panel));
        values_.push_back(packed_.back().data());
      }
    room_->keys.resize(std::size_t(shape.layers) * shape.levels);
    room_->values.resize(room_->keys.size());
  }
  Request(const Request&) = delete;
  ~Request() { model_->give(std::move(room_)); }

  // Columns of a level's logits.
  int codes(int level) const {
    if (level < 0 || level >= model_->shape_.levels)
      throw std::invalid_argument("level " + std::to_string(level) + " is not one of the model's");
    return model_->sizes_[level];
  }

  // Logits [K, sizes[level]] of beams that end in `tokens` and whose parents are rows of the step one level up.
  // A level may be asked again, with other beams, until the next one has been.
  void step(int level, std::span<const std::int64_t> tokens, std::span<const std::int64_t> parents, int threads,
            float* logits) {
    check(level, tokens, parents);
    const std::size_t beams = tokens.size(), width = model_->shape_.width;
    inherit(level, parents);
    std::vector<float*> keys, values;
    for (std::size_t i = 0; i < room_->keys.size(); ++i) {
      if (int(i % model_->sizes_.size()) == level) {
        grow(room_->keys[i], beams * width);
        grow(room_->values[i], beams * width);
      }
      keys.push_back(room_->keys[i].data());
      values.push_back(room_->values[i].data());
    }
    std::vector<const std::int32_t*> ancestors;
    for (const auto& rows : ancestors_.back()) ancestors.push_back(rows.data());
    std::size_t first = 0;
    for (int t = 0; t < level; ++t) first += model_->sizes_[t];
    const Step step{model_->shape_,
                    model_->layers_.data(),
                    model_->embeddings_.data(),
                    model_->positions_.data() + level * width,
                    model_->norm(model_->embedding_norm_),
                    level,
                    tokens.data(),
                    ancestors.data(),
                    keys.data(),
                    values.data(),
                    int(prompt_),
                    bias_.data(),
                    keys_.data(),
                    values_.data(),
                    model_->sizes_[level],
                    model_->heads_[level].data(),
                    model_->head_bias_.data() + first,
                    logits};
    run(step, int(beams), threads);
  }

 private:
  void check(int level, std::span<const std::int64_t> tokens, std::span<const std::int64_t> parents) const {
    if (level < 0 || level >= int(model_->sizes_.size()) || level > int(ancestors_.size()))
      throw std::invalid_argument("level " + std::to_string(level) + " does not follow the last one");
    if (tokens.empty() || tokens.size() != parents.size())
      throw std::invalid_argument("tokens and parents must have one and the same number of rows, at least one");
    const std::int64_t known = std::int64_t(model_->embeddings_.size() / model_->shape_.width);
    const std::int64_t rows = level ? std::int64_t(ancestors_[level - 1].back().size()) : 1;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < 0 || tokens[i] >= known)
        throw std::invalid_argument("token " + std::to_string(tokens[i]) + " is not one of the model's");
      if (parents[i] < 0 || parents[i] >= rows)
        throw std::invalid_argument("parent " + std::to_string(parents[i]) + " is not a row of the last step");
    }
  }

  // Ancestors of the new beams: those of their parents, then the beams themselves. A level asked again is replaced.
  void inherit(int level, std::span<const std::int64_t> parents) {
    ancestors_.resize(level);
    std::vector<std::vector<std::int32_t>> rows(level + 1, std::vector<std::int32_t>(parents.size()));
    for (int t = 0; t < level; ++t)
      for (std::size_t i = 0; i < parents.size(); ++i) rows[t][i] = ancestors_.back()[t][parents[i]];
    std::iota(rows[level].begin(), rows[level].end(), 0);
    ancestors_.push_back(std::move(rows));
  }

  void run(const Step& step, int beams, int threads) {
    const int parts = std::clamp((beams + 15) / 16, 1, std::max(threads, 1));
    const auto part = [&](int i) {
      const int begin = int(std::int64_t(beams) * i / parts), end = int(std::int64_t(beams) * (i + 1) / parts);
      auto room = model_->take();
      model_->kernels_.step(step, begin, end, scratch(*room, end - begin));
      model_->give(std::move(room));
    };
    std::vector<std::jthread> helpers;
    for (int i = 1; i < parts; ++i) helpers.emplace_back(part, i);
    part(0);
  }

  Scratch scratch(Room& room, std::size_t rows) const {
    const Shape& shape = model_->shape_;
    const std::size_t width = shape.width, wide = std::max(width, std::size_t(shape.ffn));
    grow(room.x, rows * width);
    grow(room.wide, rows * wide);
    grow(room.attended, rows * width);
    grow(room.scores, std::max(rows * bias_.size(), shape.levels * round_up(shape.heads, 16)));
    grow(room.bytes, rows * stride(int(wide)));
    grow(room.scale, rows);
    return {room.x.data(),      room.wide.data(),  room.attended.data(),
            room.scores.data(), room.bytes.data(), room.scale.data()};
  }

  std::shared_ptr<Model> model_;
  std::unique_ptr<Room> room_;
  std::size_t prompt_;
  Buffer<float> bias_;
  std::vector<Buffer<float>> packed_;
  std::vector<const float*> keys_, values_;
  // Per step taken and level up to it: the row, on that level, of each beam's ancestor.
  std::vector<std::vector<std::vector<std::int32_t>>> ancestors_;
};

}  // namespace decoder
