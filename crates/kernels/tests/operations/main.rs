//! Every operation against its naive reference, its gradients against finite differences of that
//! reference, and its bits on pools of one, two and three threads.

mod attention;
mod bitsandbytes;
mod common;
mod elementwise;
mod grouped;
mod head;
mod linear;
mod low_rank;
mod magnitude;
mod norm;
mod optimizer;
mod relative;
