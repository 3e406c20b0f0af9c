// Placements that the search begins with.
#pragma once

#include "search.h"

namespace ep {

// Experts in the order of their ids, spread evenly; empty slots fill the rest.
std::vector<int32_t> in_order(const Shape& shape);

std::vector<int32_t> shuffled(const Shape& shape, Random& random);

// Occult's greedy (arXiv:2505.13345, Algorithm 1, as others describe it): the pair that works together most,
// then for every further group the expert that works least with all that are placed, then group by group the
// expert that works most with its members.
std::vector<int32_t> greedy(const Shape& shape, const int64_t* pairs);

// Good devices first, then good nodes of them; and the other way round.
std::vector<int32_t> devices_then_nodes(const Shape& shape,
                                        int64_t nodes,
                                        const int64_t* pairs,
                                        int64_t patience,
                                        Deadline deadline,
                                        Random& random);
std::vector<int32_t> nodes_then_devices(const Shape& shape,
                                        int64_t nodes,
                                        const int64_t* pairs,
                                        int64_t patience,
                                        Deadline deadline,
                                        Random& random);

}  // namespace ep
