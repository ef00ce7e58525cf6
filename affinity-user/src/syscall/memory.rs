//! The memory of an array that was made with `BPF_F_MMAPABLE` (Linux 5.5): many values are written without a call for each.

use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;

use bytemuck::Pod;
use memmap2::{MmapOptions, MmapRaw};

/// What the kernel rounds an element's size up to (`array_map_alloc` of `kernel/bpf/arraymap.c`).
const ALIGNMENT: usize = 8;

/// The elements in a row of an array, where programs see them. They are mapped for as long as this lives, so that they count to
/// the process's memory no longer than that.
pub struct Elements<V> {
    memory: MmapRaw,
    count: usize,
    values: PhantomData<V>,
}

impl<V: Pod> Elements<V> {
    const STRIDE: usize = size_of::<V>().next_multiple_of(ALIGNMENT);
    const ALIGNED: () = assert!(align_of::<V>() <= ALIGNMENT);

    /// Maps elements of an array of `V`.
    ///
    /// # Errors
    /// Where the array was not made for it, or ends before them.
    pub fn map(array: BorrowedFd<'_>, first: u32, count: usize) -> io::Result<Self> {
        let memory = Self::place(first, count).map_raw(&array)?;
        Ok(Self { memory, count, values: PhantomData })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Writes values from an element on, as many as have room. A program that reads one meanwhile sees what was there or what
    /// will be, where it is of at most a word.
    pub fn store(&mut self, from: usize, values: &[V]) {
        for (index, value) in (from..self.count).zip(values) {
            let element = self.memory.as_mut_ptr().wrapping_add(index * Self::STRIDE).cast::<V>();
            // SAFETY: it is within what is mapped, and aligned, as elements are to eight bytes and `V` to no more; programs
            // may read it meanwhile, so it is written as what others see.
            unsafe { element.write_volatile(*value) };
        }
    }

    /// The values of elements of an array of `V`.
    ///
    /// # Errors
    /// As [`Elements::map`].
    pub fn read(array: BorrowedFd<'_>, first: u32, count: usize) -> io::Result<Vec<V>> {
        let memory = Self::place(first, count).map_raw_read_only(&array)?;
        let element = |index| memory.as_ptr().wrapping_add(index * Self::STRIDE).cast::<V>();
        // SAFETY: it is within what is mapped, and aligned; any bytes are a `V`.
        Ok((0..count).map(|index| unsafe { element(index).read_volatile() }).collect())
    }

    fn place(first: u32, count: usize) -> MmapOptions {
        let () = Self::ALIGNED;
        let mut options = MmapOptions::new();
        options.offset(u64::from(first) * Self::STRIDE as u64).len(count * Self::STRIDE);
        options
    }
}
