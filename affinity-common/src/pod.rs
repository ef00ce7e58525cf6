//! Plain memory: what map keys and values are made of.

/// Defines map keys and values: `repr(C)`, [`bytemuck::Pod`], without padding, of the asserted size.
///
/// `pub struct Name: SIZE { … }`, or `pub struct Name<F>: V4_SIZE, V6_SIZE { … }` for one that differs by family.
macro_rules! pod {
    () => {};
    ($(#[$meta:meta])* pub struct $name:ident: $size:literal {
        $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)+
    } $($rest:tt)*) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)+ }
        const _: () = assert!(size_of::<$name>() == $size);
        $crate::pod::pod! { $($rest)* }
    };
    ($(#[$meta:meta])* pub struct $name:ident<F>: $v4:literal, $v6:literal {
        $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)+
    } $($rest:tt)*) => {
        $(#[$meta])*
        #[repr(C, align(4))]
        #[derive(Clone, Copy, Debug)]
        pub struct $name<F: $crate::family::Family> { $($(#[$field_meta])* pub $field: $ty,)+ }

        const _: () = {
            use $crate::family::{Family, V4, V6};
            const fn fields<F: Family>() -> usize { 0 $(+ size_of::<$ty>())+ }
            const fn plain<T: bytemuck::Pod>() {}
            #[expect(dead_code, reason = "only its type check is wanted")]
            const fn every_field_is_plain<F: Family>() { $(plain::<$ty>();)+ }
            assert!(size_of::<$name<V4>>() == $v4 && fields::<V4>() == $v4);
            assert!(size_of::<$name<V6>>() == $v6 && fields::<V6>() == $v6);
        };
        // SAFETY: every field is `Pod`, hence zeroable.
        unsafe impl<F: $crate::family::Family> bytemuck::Zeroable for $name<F> {}
        // SAFETY: `repr(C)`, every field is `Pod`, and the size is the sum of the fields' sizes for both families, so
        // there is no padding: all asserted above. `Family` is sealed, so there is no third.
        unsafe impl<F: $crate::family::Family> bytemuck::Pod for $name<F> {}
        $crate::pod::pod! { $($rest)* }
    };
}
pub(crate) use pod;
