// The list of ops. Outputs are the caller's buffers, marked (a!): no op allocates, and none waits for the
// device.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ep_engine, m) {
  m.def(
      "plan_send(Tensor expert_ids, Tensor slot_of_expert, int num_ranks, int slots_per_rank, int own_rank, "
      "bool one_row_per_copy, Tensor(a!) rows_per_rank, Tensor(b!) row_token, Tensor(c!) row_slot, "
      "Tensor(d!) row_choice, Tensor(e!) visit_row, Tensor(f!) visit_rank, Tensor(g!) scratch) -> ()");
  m.def(
      "plan_arrival(Tensor row_slot, Tensor rows_from_rank, int own_rank, Tensor(a!) rows_per_slot, "
      "Tensor(b!) position, Tensor(c!) copy_row, Tensor(d!) scratch) -> ()");
  m.def("gather_rows(Tensor x, Tensor row, Tensor? weight, Tensor(a!) out) -> ()");
  m.def(
      "combine_rows(Tensor y, Tensor index, Tensor leaf, Tensor? weight, int[] group_sizes, Tensor(a!) out) "
      "-> ()");
  m.def("combine_rows_weight_grad(Tensor grad_out, Tensor y, Tensor index, Tensor(a!) grad_weight) -> ()");
  m.def("linear_rows(Tensor x, Tensor w, Tensor(a!) out) -> ()");
  m.def("count_pairs(Tensor expert_ids, Tensor(a!) counts) -> ()");
}

// `import ep_engine._C` loads the library and so registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
