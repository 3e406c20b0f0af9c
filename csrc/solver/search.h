// Tabu search by swaps: each step makes the best swap that does not undo a recent one, also a losing one.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "level.h"

namespace ep {

// The same numbers on every machine (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }

 private:
  uint64_t next();
  uint64_t state_;
};

// A placement and what it is worth: load beyond the room first, then the objective.
struct Candidate {
  std::vector<int32_t> group_of_item;
  int64_t excess;
  int64_t value;

  bool better_than(const Candidate& other) const {
    return excess != other.excess ? excess < other.excess : value > other.value;
  }
};

using Levels = std::vector<std::unique_ptr<Level>>;
using Deadline = std::chrono::steady_clock::time_point;

class Search {
 public:
  // `load` [experts] may be null, then `room` is unread.
  Search(const Shape& shape, Levels levels, const int64_t* load, int64_t room);

  Candidate judge(const std::vector<int32_t>& group_of_item);  // leaves the search there
  // Ends after `patience` steps without a better placement, at `deadline`, or at a value of `enough` within
  // the room.
  Candidate improve(
      const std::vector<int32_t>& start, int64_t patience, int64_t enough, Deadline deadline, Random& random);
  bool cut_short() const { return cut_short_; }
  const Shape& shape() const { return shape_; }

 private:
  struct Swap {
    int64_t i = -1, j = -1, gain = 0, relief = 0;
  };

  Swap choose(const Candidate& best, int64_t step, double price) const;
  int64_t relief(int64_t i, int64_t j) const;
  void make(const Swap& swap);
  Candidate here() const;

  Shape shape_;
  Levels levels_;
  std::vector<int64_t> load_;  // [items]; 0 for an empty slot
  int64_t room_;
  std::vector<int32_t> group_;
  std::vector<int64_t> load_of_group_, empty_of_group_;
  std::vector<int64_t> barred_until_;  // [items, groups] the step from which an item may go back there
  int64_t excess_ = 0;
  bool cut_short_ = false;
};

}  // namespace ep
