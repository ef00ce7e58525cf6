//! Clients outside of the cluster: by node ports, load balancers' and external addresses, to pods of the node and of others.

mod beside;
mod cases;
mod frontends;
mod nodes;
mod ports;
mod site;
