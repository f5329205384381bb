// One translation unit for each instruction set.
#include "dkd.cpp"
#include "gan_generator.cpp"
#include "jsd.cpp"
#include "tanh_l1.cpp"
#include "tempered_kl.cpp"
#include "tempered_kl_labels.cpp"
#include "tempered_kl_topk.cpp"
