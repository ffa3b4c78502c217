
mod network;
