//! The laboratory of the project: everything that the demo, the benchmark and the suites share.
//!
//! * [`netns`] and [`mountns`]: namespaces that nothing but this process holds, so that they vanish with it.
//! * [`topology`]: clients, backends and a routing node between them, wired as a CNI plugin wires pods.
//! * [`branch`]: a machine behind a router, with a narrow link on the way.
//! * [`traffic`]: HTTP and UDP backends that serve their own name, and clients that ask for it.
//! * [`cgroup`]: cgroups of single tests, for the programs of sockets.
//! * [`capture`]: what is seen on a wire, and frames put onto one.
//! * [`packet`]: whole frames built as data, compared, and their checksums verified.
//! * [`apiserver`]: a real etcd and kube-apiserver, and a door in front of them that can be shut.
//! * [`objects`]: the Kubernetes objects that the suites write.
//! * [`daemon`]: the `affinity` binary, run in a lab node.
//! * [`view`]: what its verbs print.
//!
//! All of it is synchronous, so that a test reads from top to bottom; what is asynchronous below (netlink, `kube`) brings
//! its own runtime. Everything but [`packet`] and [`objects`] needs root: see [`privilege`].

pub mod apiproxy;
pub mod apiserver;
pub mod branch;
pub mod capture;
pub mod certs;
pub mod cgroup;
pub mod daemon;
pub mod mountns;
pub mod netlink;
pub mod netns;
pub mod objects;
pub mod packet;
pub mod privilege;
pub mod process;
pub mod programs;
mod sys;
pub mod topology;
pub mod traffic;
pub mod view;
pub mod wait;

pub use sys::grace_period;
