//! The node's pods: by which ways they are served, what is told of that, and which rights the daemon needs for it.

mod capabilities;
mod served;
mod site;
