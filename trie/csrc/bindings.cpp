// The only file that knows Python. Every call that does real work releases the GIL; std::invalid_argument arrives
// in Python as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "beam.hpp"
#include "build.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using sid::BeamSearch;
using sid::Code;
using sid::EdgeMask;
using sid::Trie;

template <class T, std::size_t Dims>
using Input = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
template <class T, std::size_t Dims>
using Output = nb::ndarray<nb::numpy, T, nb::ndim<Dims>, nb::c_contig>;

// A new NumPy array, filled by `fill(T*)` without the GIL.
template <class T, std::size_t Dims, class Fill>
Output<T, Dims> make_array(const std::array<std::size_t, Dims>& shape, Fill fill) {
  std::size_t count = 1;
  for (const std::size_t extent : shape) count *= extent;
  std::unique_ptr<T[]> data(new T[count]);
  {
    const nb::gil_scoped_release release;
    fill(data.get());
  }
  const nb::capsule owner(data.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Output<T, Dims>(data.release(), Dims, shape.data(), owner);
}

std::shared_ptr<Trie> build(const Input<std::uint16_t, 2>& codes, const std::vector<std::uint32_t>& sizes) {
  if (codes.shape(1) != sizes.size())
    throw std::invalid_argument("codes has " + std::to_string(codes.shape(1)) + " columns, sizes has " +
                                std::to_string(sizes.size()) + " levels");
  const nb::gil_scoped_release release;
  return std::make_shared<Trie>(sid::build({codes.data(), codes.size()}, sizes));
}

std::shared_ptr<Trie> open(Input<std::uint8_t, 1> image) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(image.data()), image.size());
  const std::shared_ptr<const void> owner(new Input<std::uint8_t, 1>(std::move(image)), [](const void* p) {
    const nb::gil_scoped_acquire acquire;
    delete static_cast<const Input<std::uint8_t, 1>*>(p);
  });
  const nb::gil_scoped_release release;
  return std::make_shared<Trie>(Trie::open(bytes, owner));
}

auto index(const Trie& trie, const Input<std::uint16_t, 2>& codes) {
  const std::size_t depth = trie.levels();
  if (codes.shape(1) != depth)
    throw std::invalid_argument("codes has " + std::to_string(codes.shape(1)) + " columns, the trie has " +
                                std::to_string(depth) + " levels");
  return make_array<std::int64_t, 1>({codes.shape(0)}, [&](std::int64_t* out) {
    for (std::size_t row = 0; row < codes.shape(0); ++row)
      out[row] = trie.node({codes.data() + row * depth, depth});
  });
}

auto children(const Trie& trie, const Input<std::uint16_t, 1>& prefix) {
  if (prefix.size() >= trie.levels())
    throw std::invalid_argument("prefix has " + std::to_string(prefix.size()) + " codes, expected fewer than " +
                                std::to_string(trie.levels()));
  const std::int64_t node = trie.node({prefix.data(), prefix.size()});
  const sid::Level& level = trie.level(static_cast<std::uint32_t>(prefix.size()));
  const sid::EdgeRange range = node < 0 ? sid::EdgeRange{0, 0} : level.children(static_cast<std::uint32_t>(node));
  return make_array<std::uint16_t, 1>({range.size()}, [&](std::uint16_t* out) {
    std::copy_n(level.codes + range.begin, range.size(), out);
  });
}

void bind_trie(nb::module_& m) {
  nb::class_<Trie>(m, "Trie", "Immutable prefix trie of SIDs over one byte image.")
      .def_static("build", &build, "codes"_a, "sizes"_a, "Build from codes [N, L]; duplicates are allowed.")
      .def_static("open", &open, "image"_a, "Verify and view an image; it is kept alive, not copied.")
      .def_prop_ro("num_sids", &Trie::num_sids)
      .def_prop_ro("sizes",
                   [](const Trie& trie) {
                     std::vector<std::uint32_t> sizes;
                     for (std::uint32_t t = 0; t < trie.levels(); ++t) sizes.push_back(trie.level(t).size);
                     return sizes;
                   })
      .def("image",
           [](nb::handle_t<Trie> self) {
             const auto image = nb::cast<const Trie&>(self).image();
             return nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>>(image.data(), {image.size()}, self);
           },
           "All bytes of the trie, read-only, without a copy.")
      .def("index", &index, "codes"_a, "Leaf index of each SID of codes [M, L], -1 when absent.")
      .def("children", &children, "prefix"_a, "Codes that may follow a prefix, ascending.")
      .def("sids",
           [](const Trie& trie) {
             return make_array<std::uint16_t, 2>({trie.num_sids(), trie.levels()},
                                                 [&](std::uint16_t* out) { trie.write_sids(out); });
           },
           "All SIDs in order, [num_sids, L].");
}

void bind_mask(nb::module_& m) {
  nb::class_<EdgeMask>(m, "EdgeMask", "Legal edges of one trie under a filter, one bit per edge; immutable.")
      .def("__init__",
           [](EdgeMask* self, std::shared_ptr<const Trie> trie, const Input<bool, 1>& legal) {
             const nb::gil_scoped_release release;
             new (self) EdgeMask(std::move(trie), {reinterpret_cast<const std::uint8_t*>(legal.data()), legal.size()});
           },
           "trie"_a, "legal"_a)
      .def_static("all", [](std::shared_ptr<const Trie> trie) { return std::make_shared<EdgeMask>(std::move(trie)); },
                  "trie"_a, "Every SID is legal.")
      .def("without",
           [](const EdgeMask& mask, const Input<std::int64_t, 1>& leaves) {
             const nb::gil_scoped_release release;
             return std::make_shared<EdgeMask>(mask.without({leaves.data(), leaves.size()}));
           },
           "leaves"_a, "This mask less some leaf indices; ValueError for one out of range.")
      .def_prop_ro("num_sids", [](const EdgeMask& mask) { return mask.trie().num_sids(); }, "SIDs, legal or not.")
      .def("legal",
           [](const EdgeMask& mask) {
             return make_array<bool, 1>({mask.trie().num_sids()}, [&](bool* out) { mask.write_legal(out); });
           },
           "Whether each SID is legal, by leaf index: what `subset` was given.")
      .def_prop_ro("num_legal", &EdgeMask::num_legal, "Legal SIDs.")
      .def_prop_ro("nbytes", &EdgeMask::bytes);
}

void advance(BeamSearch& beam, const Input<float, 2>& logits) {
  if (beam.done()) throw std::invalid_argument("the search is over");
  if (logits.shape(0) != beam.rows() || logits.shape(1) != beam.row_size())
    throw std::invalid_argument("logits has shape (" + std::to_string(logits.shape(0)) + ", " +
                                std::to_string(logits.shape(1)) + "), expected (" + std::to_string(beam.rows()) +
                                ", " + std::to_string(beam.row_size()) + ")");
  const nb::gil_scoped_release release;
  beam.advance(logits.data());
}

auto results(const BeamSearch& beam) {
  if (!beam.done()) throw std::invalid_argument("the search is not over");
  const std::size_t n = beam.num_beams();
  auto codes = make_array<std::uint16_t, 2>({n, beam.levels()}, [](std::uint16_t*) {});
  auto scores = make_array<float, 1>({n}, [](float*) {});
  auto leaves = make_array<std::int64_t, 1>({n}, [](std::int64_t*) {});
  beam.write_results(codes.data(), scores.data(), leaves.data());
  return std::make_tuple(std::move(codes), std::move(scores), std::move(leaves));
}

void bind_beam(nb::module_& m) {
  nb::class_<BeamSearch>(m, "Beam", "State of one beam search; not to be shared between threads.")
      .def("__init__",
           [](BeamSearch* self, std::shared_ptr<const Trie> trie, std::uint32_t width, std::uint32_t top_n, bool legal,
              std::shared_ptr<const EdgeMask> mask, std::uint32_t chunk, std::shared_ptr<const Trie> added,
              std::shared_ptr<const EdgeMask> added_mask) {
             sid::Layers layers({std::move(trie), std::move(mask)}, {std::move(added), std::move(added_mask)});
             new (self) BeamSearch(std::move(layers), {width, top_n, legal, chunk});
           },
           "trie"_a, "width"_a, "top_n"_a, "legal"_a, "mask"_a.none() = nb::none(), "chunk"_a = 0,
           "added"_a.none() = nb::none(), "added_mask"_a.none() = nb::none())
      .def_prop_ro("level", &BeamSearch::level, "Levels finished so far.")
      .def_prop_ro("rows", &BeamSearch::rows, "Rows that need logits for the next advance.")
      .def("codes",
           [](const BeamSearch& beam) {
             return make_array<std::uint16_t, 2>({beam.rows(), beam.level()},
                                                 [&](std::uint16_t* out) { beam.write_rows(out); });
           },
           "Prefix of each row, [rows, t], in code order.")
      .def("parents",
           [](const BeamSearch& beam) {
             return make_array<std::int64_t, 1>({beam.rows()}, [&](std::int64_t* out) { beam.write_parents(out); });
           },
           "Row of each row's parent among the rows of the previous level.")
      .def("advance", &advance, "logits"_a,
           "Expand the current rows with raw logits [rows, sizes[t]]; on the last level more rows may follow.")
      .def_prop_ro("kept", &BeamSearch::kept, "Beams kept on each level so far.")
      .def("results", &results, "(codes [n, L], scores [n], leaves [n]), best first; after the last level.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native trie and beam kernels; use them through `trie.SidTrie`.";
  bind_trie(m);
  bind_mask(m);
  bind_beam(m);
}
