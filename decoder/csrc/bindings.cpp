// The only file that knows Python. A step releases the GIL; std::invalid_argument arrives in Python as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, std::size_t Dims>
using Input = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<nb::numpy, T, nb::ndim<2>, nb::c_contig>;

template <class T>
Table<T> make_table(std::size_t rows, std::size_t columns) {
  T* data = new T[rows * columns];
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Table<T>(data, {rows, columns}, owner);
}

std::vector<float> copied(const auto& array) {
  return {array.data(), array.data() + array.size()};
}

// weight [n, k], scale [n], bias [n]
using Product = std::tuple<Input<std::int8_t, 2>, Input<float, 1>, Input<float, 1>>;

decoder::Weights weights(const Product& product, const decoder::Kernels& kernels) {
  const auto& [weight, scale, bias] = product;
  if (scale.size() != weight.shape(0) || bias.size() != weight.shape(0))
    throw std::invalid_argument("weight, scale and bias of a product disagree");
  return {weight.data(), {scale.data(), scale.size()}, {bias.data(), bias.size()}, weight.shape(1), kernels};
}

// Integer products of bytes [rows, k] with weight [n, k] as the kernels do them, `repeat` times: for the tests and for
// measuring what the machine can do at best.
auto product(const Input<std::uint8_t, 2>& rows, const Input<std::int8_t, 2>& weight, const std::string& name,
             int repeat) {
  const decoder::Kernels& kernels = decoder::choose_kernels(name);
  const std::size_t n = weight.shape(0), k = weight.shape(1), count = rows.shape(0);
  if (rows.shape(1) != k) throw std::invalid_argument("rows and weight disagree");
  const std::vector<float> ones(n, 1.0f);
  const decoder::Weights packed(weight.data(), ones, ones, k, kernels);
  decoder::Buffer<std::uint8_t> bytes(count * decoder::stride(int(k)));
  for (std::size_t row = 0; row < count; ++row)
    std::copy_n(rows.data() + row * k, k, bytes.data() + row * decoder::stride(int(k)));
  auto out = make_table<std::int32_t>(count, n);
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) kernels.product(packed.view(), bytes.data(), int(count), out.data());
  return out;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native int8 decoder steps; `onesearch.runtime.Int8Decoder` drives them.";
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const decoder::Kernels* kernels : decoder::available_kernels()) names.emplace_back(kernels->name);
    return names;
  }, "Names of the kernels this machine can run, fastest first.");

  m.def("product", &product, "rows"_a, "weight"_a, "kernels"_a = "", "repeat"_a = 1,
        "Σ_k (rows[i, k] - zero) weight[n, k] as int32 [rows, n], for tests and measurements.");

  nb::class_<decoder::Model>(m, "Model", "Packed weights; immutable once filled, shared by all requests.")
      .def("__init__",
           [](decoder::Model* self, int width, int heads, int ffn, const std::vector<int>& sizes,
              const std::string& kernels) {
             new (self) decoder::Model({width, heads, ffn, 0, 0}, sizes, kernels);
           },
           "width"_a, "heads"_a, "ffn"_a, "sizes"_a, "kernels"_a = "")
      .def("set_tables",
           [](decoder::Model& self, const Input<float, 2>& embeddings, const Input<float, 2>& positions,
              const Input<float, 2>& norm, const Input<float, 1>& head_bias) {
             self.set_tables(copied(embeddings), copied(positions), copied(norm), copied(head_bias));
           },
           "embeddings"_a, "positions"_a, "norm"_a, "head_bias"_a)
      .def("add_layer",
           [](decoder::Model& self, const std::vector<Product>& products, const std::vector<Input<float, 2>>& norms) {
             std::vector<decoder::Weights> packed;
             for (const Product& product : products) packed.push_back(weights(product, self.kernels()));
             std::vector<std::vector<float>> copies;
             for (const auto& norm : norms) copies.push_back(copied(norm));
             self.add_layer(std::move(packed), std::move(copies));
           },
           "products"_a, "norms"_a)
      .def_prop_ro("kernels", [](const decoder::Model& self) { return self.kernels().name; })
      .def("start",
           [](std::shared_ptr<decoder::Model> self, const Input<float, 1>& bias,
              const std::vector<Input<float, 3>>& context) {
             const auto& shape = self->shape();
             const std::size_t heads = shape.heads, size = shape.width / shape.heads, prompt = bias.size();
             if (prompt == 0 || context.size() != 2 * std::size_t(shape.layers))
               throw std::invalid_argument("context must have keys and values of every layer, and a token");
             std::vector<const float*> keys, values;
             for (std::size_t i = 0; i < context.size(); ++i) {
               const auto& part = context[i];
               const bool fits = part.shape(0) == heads && part.shape(1) == (i % 2 ? prompt : size) &&
                                 part.shape(2) == (i % 2 ? size : prompt);
               if (!fits) throw std::invalid_argument("context " + std::to_string(i) + " has a wrong shape");
               (i % 2 ? values : keys).push_back(part.data());
             }
             const nb::gil_scoped_release release;
             return std::make_shared<decoder::Request>(std::move(self), std::span(bias.data(), prompt), keys, values);
           },
           "bias"_a, "context"_a, "Begin a request: bias [S], then keys [h, d, S] and values [h, S, d] per layer.");

  nb::class_<decoder::Request>(m, "Request", "State of one search; not to be shared between threads.")
      .def("step",
           [](decoder::Request& self, int level, const Input<std::int64_t, 1>& tokens,
              const Input<std::int64_t, 1>& parents, int threads) {
             auto logits = make_table<float>(tokens.size(), self.codes(level));
             const nb::gil_scoped_release release;
             self.step(level, {tokens.data(), tokens.size()}, {parents.data(), parents.size()}, threads, logits.data());
             return logits;
           },
           "level"_a, "tokens"_a, "parents"_a, "threads"_a = 1, "Logits [K, sizes[level]].");
}
