// Branch and bound over all placements, devices being numbered as they are first used.
#pragma once

#include "search.h"

namespace ep {

// What an objective says of a placement that is made expert by expert.
class Partial {
 public:
  virtual ~Partial() = default;
  virtual int64_t add(int64_t expert, int64_t device) = 0;  // returns what the value grows by
  virtual void remove(int64_t expert, int64_t device) = 0;
  // No less than what the value can grow by when `expert` and all after it are added.
  virtual int64_t most_left(int64_t expert) const = 0;
};

class PartialPairs : public Partial {
 public:
  PartialPairs(const Shape& shape, int64_t nodes, int64_t node_weight, const int64_t* pairs);
  int64_t add(int64_t expert, int64_t device) override;
  void remove(int64_t expert, int64_t device) override;
  int64_t most_left(int64_t expert) const override;

 private:
  struct OfLevel : TreeLevel {
    Matrix tie;  // [groups, experts] pairs of an expert with those in a group
    Matrix
        largest;  // [experts, experts] row f: pairs of an expert with its best partners among f and all after
  };

  int64_t experts_;
  const int64_t* pairs_;
  std::vector<OfLevel> levels_;
};

class PartialSets : public Partial {
 public:
  PartialSets(const Shape& shape, int64_t nodes, int64_t node_weight, const TokenSets& sets);
  int64_t add(int64_t expert, int64_t device) override;
  void remove(int64_t expert, int64_t device) override;
  int64_t most_left(int64_t) const override { return 0; }  // distinct devices only become more

 private:
  struct OfLevel : TreeLevel {
    std::vector<int8_t> seen;  // [sets, groups] experts of a set in a group
  };

  const TokenSets& sets_;
  std::vector<OfLevel> levels_;
};

struct Enumerated {
  Candidate best;
  bool complete;
};

// The best of all placements if it is found with `limit` partial ones; otherwise `known` or what is better by
// then.
Enumerated enumerate(const Shape& shape,
                     int64_t nodes,
                     Partial& partial,
                     const int64_t* load,
                     int64_t room,
                     const Candidate& known,
                     int64_t limit,
                     Deadline deadline);

}  // namespace ep
