// Keeps the 2 entries of largest magnitude in each row, without Python.
#include <scalpel/topk/topk.h>

#include <cstdio>

int main() {
  float x[2][4] = {{0.5F, -3.0F, 1.0F, 2.0F}, {-1.0F, 1.0F, 0.0F, 1.0F}};
  float kept[2][4];
  using scalpel::DType, scalpel::TensorView;
  scalpel::keep_topk(TensorView::matrix(x, DType::kFloat32, 2, 4), 2, scalpel::RankBy::kMagnitude,
                     TensorView::matrix(kept, DType::kFloat32, 2, 4));
  for (const auto& row : kept) std::printf("%g %g %g %g\n", row[0], row[1], row[2], row[3]);
}
