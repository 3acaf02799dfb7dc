//! Kernels made for the purpose, good and bad, loaded into guest memory.

mod bzimage;
mod elf;
mod images;
mod kaslr;
mod load;
mod mutated;
mod payload;
