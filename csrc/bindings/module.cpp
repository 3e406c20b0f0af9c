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
      "plan_arrival(Tensor row_slot, Tensor rows_of_run, Tensor run_order, Tensor(a!) rows_per_slot, "
      "Tensor(b!) position, Tensor(c!) copy_row, Tensor(d!) scratch) -> ()");
  m.def(
      "choose_experts(Tensor logits, Tensor? bias, Tensor? lists, Tensor? group_of, int rule, int top_t, "
      "int num_groups, int max_groups, int group_top, int score, bool renormalise, float scale, "
      "Tensor(a!) ids, Tensor(b!) weights) -> ()");
  m.def(
      "choose_experts_backward(Tensor grad_weights, Tensor logits, Tensor ids, int score, bool renormalise, "
      "float scale, Tensor(a!) grad_logits) -> ()");
  m.def("choice_weights(Tensor weights, Tensor choice, Tensor(a!) rows) -> ()");
  m.def("choice_weights_backward(Tensor grad_rows, Tensor choice, Tensor(a!) grad_weights) -> ()");
  m.def("gather_rows(Tensor x, Tensor row, Tensor? weight, bool streaming, Tensor(a!) out) -> ()");
  m.def(
      "combine_rows(Tensor y, Tensor index, Tensor leaf, Tensor? weight, int[] group_sizes, bool streaming, "
      "Tensor(a!) out) -> ()");
  m.def("quantise_rows(Tensor x, Tensor row, Tensor(a!) values, Tensor(b!) scales) -> ()");
  m.def("dequantise_rows(Tensor values, Tensor scales, Tensor(a!) out) -> ()");
  m.def("swiglu(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def(
      "swiglu_backward(Tensor grad, Tensor gate_up, Tensor weight, Tensor(a!) grad_gate_up, Tensor(b!) "
      "hidden, "
      "Tensor(c!) grad_weight) -> ()");
  m.def(
      "experts_forward(Tensor x, Tensor copy_row, Tensor copies_of_slot, Tensor w_gate_up, Tensor w_down, "
      "Tensor(a!) gate_up, Tensor(b!)? y) -> ()");
  m.def(
      "experts_backward(Tensor grad, Tensor x, Tensor copy_row, Tensor copies_of_slot, Tensor w_gate_up, "
      "Tensor w_down, Tensor gate_up, Tensor weight, Tensor(a!) grad_x, Tensor(b!) grad_weight, "
      "Tensor(c!)? grad_gate_up, Tensor(d!)? hidden, Tensor(e!)? grad_w_gate_up, Tensor(f!)? grad_w_down) -> "
      "()");
  m.def(
      "experts_weight_grads(Tensor grad, Tensor x, Tensor copy_row, Tensor copies_of_slot, "
      "Tensor grad_gate_up, Tensor hidden, Tensor(a!) grad_w_gate_up, Tensor(b!) grad_w_down) -> ()");
  m.def("linear_rows(Tensor x, Tensor w, Tensor(a!) out) -> ()");
  m.def("checksum(Tensor elements, int columns, int first, int row_step, int column_step) -> int");
  m.def("count_pairs(Tensor expert_ids, Tensor(a!) counts) -> ()");
  m.def(
      "shared_memory_open(Tensor[] arenas, Tensor process, int rank, float timeout_s, int number, Tensor "
      "place, "
      "Tensor expected, Tensor sending, Tensor(a!) destination) -> int");
  m.def("shared_memory_close(Tensor[] arenas, Tensor process, int rank, float timeout_s, int number) -> int");
  m.def(
      "shared_memory_counts(Tensor[] arenas, Tensor process, int rank, float timeout_s, int number, "
      "Tensor counts, Tensor(a!) received) -> int");
  m.def("shared_memory_fail(Tensor[] arenas, Tensor process, int rank) -> ()");
}

// `import ep_engine._C` loads the library and so registers the ops; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module{
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
