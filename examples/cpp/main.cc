// Neighborhood attention as an edge-preserving mean: each pixel becomes the average of the 3 x 3 pixels around it that
// are most like it. A step edge with a little noise keeps its edge and loses its noise.
#include <cmath>
#include <cstdio>
#include <vector>
#include <vicus/vicus.hpp>

int main() {
  constexpr int kSize = 8;
  std::vector<float> query, key, image, output(kSize * kSize);
  for (int i = 0; i < kSize * kSize; ++i) {
    const float pixel = (i % kSize < kSize / 2 ? 0.F : 1.F) + 0.05F * std::sin(7.F * static_cast<float>(i));
    image.push_back(pixel);
    query.insert(query.end(), {2 * pixel, -1.F});   // 2 q k - k^2 = q^2 - (q - k)^2:
    key.insert(key.end(), {pixel, pixel * pixel});  // the nearer the pixels, the larger the weight
  }
  vicus::neighborhood_attention({query.data(), {1, kSize, kSize, 1, 2}}, {key.data(), {1, kSize, kSize, 1, 2}},
                                {image.data(), {1, kSize, kSize, 1, 1}}, {output.data(), {1, kSize, kSize, 1, 1}},
                                {.kernel_size = 3}, /*scale=*/50.0);
  for (int i = 0; i < kSize * kSize; ++i)
    std::printf("%.4f%c", output[static_cast<std::size_t>(i)], i % kSize == kSize - 1 ? '\n' : ' ');
}
