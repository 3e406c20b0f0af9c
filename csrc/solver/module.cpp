// The solver for numpy: `ep_engine._solver`. Checked by its one caller, ep_engine/c2r/solver.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "placement_solver.h"

namespace py = pybind11;

namespace {

template <class Number>
using Array = py::array_t<Number, py::array::c_style>;

py::tuple solve(int64_t devices,
                int64_t nodes,
                int64_t node_weight,
                const std::optional<Array<int64_t>>& pairs,
                const std::optional<Array<int16_t>>& tokens,
                const Array<int64_t>& load,
                int64_t room,
                uint64_t seed,
                int64_t starts,
                int64_t refined,
                int64_t steps,
                int64_t partitions,
                double seconds) {
  const ep::PlacementProblem problem{.num_experts = load.size(),
                                     .devices = devices,
                                     .nodes = nodes,
                                     .node_weight = node_weight,
                                     .pairs = pairs ? pairs->data() : nullptr,
                                     .tokens = tokens ? tokens->data() : nullptr,
                                     .num_tokens = tokens ? tokens->shape(0) : 0,
                                     .top_k = tokens ? tokens->shape(1) : 1,
                                     .load = load.data(),
                                     .room = room};
  const ep::PlacementEffort effort{seed, starts, refined, steps, partitions, seconds};
  ep::FoundPlacement found;
  {
    py::gil_scoped_release others_may_run;
    found = ep::solve_placement(problem, effort);
  }
  Array<int32_t> device_of_expert(found.device_of_expert.size(), found.device_of_expert.data());
  return py::make_tuple(device_of_expert, found.value, found.excess, found.proven, found.cut_short);
}

}  // namespace

PYBIND11_MODULE(_solver, m) {
  using py::arg;
  m.def("solve",
        &solve,
        py::kw_only(),
        arg("devices"),
        arg("nodes"),
        arg("node_weight"),
        arg("pairs").noconvert(),
        arg("tokens").noconvert(),
        arg("load").noconvert(),
        arg("room"),
        arg("seed"),
        arg("starts"),
        arg("refined"),
        arg("steps"),
        arg("partitions"),
        arg("seconds"));
}
