// Compiled with the flags of gates_avx512.cpp and -mavx512bf16.
#include "convlstm/gates_avx512.cpp"
